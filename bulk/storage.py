"""A folder on any of fsspec's file systems, in which files appear whole or not at all."""

import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

import fsspec

# Files on their way to their names.
PARTS = "_parts"


class Folder:
    """A folder, local or anywhere that fsspec reaches.

    Args:
        url: a path, or a URL such as s3://bucket/folder, for which fsspec's package of that kind must be installed.
    """

    def __init__(self, url: str) -> None:
        self.files, self.root = fsspec.core.url_to_fs(url)
        # Absolute, for processes that run elsewhere.
        self.url = self.files.unstrip_protocol(self.root)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def names(self, inside: str = "") -> set[str]:
        """The names of what is in the folder, or in a folder in it; none if that is not there."""
        self.files.invalidate_cache()
        try:
            return {path.rstrip("/").rpartition("/")[2] for path in self.files.ls(self.path(inside), detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            FileNotFoundError: it is not there.
        """
        return self.files.cat_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a file; one of that name is replaced."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self.publish({name: Path(file.name)})

    def publish(self, files: Mapping[str, Path]) -> None:
        """Copy local files to the folder. They get their names, in this order, when all are there; older ones are replaced.

        Moving is atomic on a local disk, and where a file system copies instead, as object stores do, a copied object
        appears whole.
        """
        moves = []
        for name, source in files.items():
            part, target = self.path(f"{PARTS}/{uuid.uuid4().hex}"), self.path(name)
            for path in (part, target):
                self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(source), part)
            moves.append((part, target))
        for part, target in moves:
            self.files.mv(part, target)

    def remove(self, *names: str) -> None:
        """Remove folders in the folder, with all that is in them, if they are there."""
        for name in names:
            if self.files.exists(self.path(name)):
                self.files.rm(self.path(name), recursive=True)
