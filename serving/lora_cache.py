"""A disk cache of downloaded LoRAs, by content, with a size limit; the least recently used ones are removed first."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from cascade.weights.hashing import sha256

# Seconds for which a downloaded source is not downloaded again.
FRESH = 3600.0
# Seconds after which an unfinished download counts as killed.
ABANDONED = 24 * 3600.0


@dataclass(frozen=True)
class Cache:
    """A folder: ``files/DIGEST/`` has the files of one LoRA, and ``sources/HASH.json`` the digest and time of a source's
    download.

    Attributes:
        root: the folder; made when needed.
        limit: bytes of all files. The files of the present request are kept even above the limit.
    """

    root: Path
    limit: int

    def get(self, source: str, fetch: Callable[[Path], None], keep: Collection[Path] = ()) -> Path:
        """The folder with a source's files. Missing files are downloaded. The folder is complete or absent.

        Args:
            source: the source's name.
            fetch: writes the files into a folder.
            keep: folders that must not be removed.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
            Exception: any error that `fetch` raises; no files are left then.
        """
        entry = self.root / "sources" / f"{hashlib.sha256(source.encode()).hexdigest()}.json"
        folder = self._known(entry)
        if folder is None:
            folder = self._fetched(fetch)
            entry.parent.mkdir(parents=True, exist_ok=True)
            with self._making() as made:
                (made / "entry").write_text(json.dumps({"digest": folder.name, "time": time.time()}))
                os.replace(made / "entry", entry)
        os.utime(folder)
        self._make_room({folder, *keep})
        return folder

    def _known(self, entry: Path) -> Path | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(entry.read_text())
            folder = self.root / "files" / str(content["digest"])
            if folder.parent == self.root / "files" and folder.is_dir() and time.time() - content["time"] < FRESH:
                return folder
        return None

    def _fetched(self, fetch: Callable[[Path], None]) -> Path:
        with self._making() as made:
            fetch(made)
            digest = hashlib.sha256()
            for file in sorted(path for path in made.rglob("*") if path.is_file()):
                digest.update(f"{sha256(file)}  {file.relative_to(made).as_posix()}\n".encode())
            folder = self.root / "files" / digest.hexdigest()
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not folder.is_dir():
                with contextlib.suppress(FileExistsError):
                    os.rename(made, folder)
                    folder.chmod(0o755)
            return folder

    @contextlib.contextmanager
    def _making(self) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="making-", dir=self.root))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _make_room(self, keep: Collection[Path]) -> None:
        """Remove LoRAs above the limit, and files of killed downloads."""
        for one in self.root.glob("making-*"):
            with contextlib.suppress(OSError):
                if time.time() - one.stat().st_mtime > ABANDONED:
                    shutil.rmtree(one, ignore_errors=True)
        folders = []
        for folder in (self.root / "files").iterdir():
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                folders.append((folder.stat().st_mtime, folder, size))
        total = sum(size for _, _, size in folders)
        for _, folder, size in sorted(folders):
            if total <= self.limit:
                return
            if folder not in keep:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size
