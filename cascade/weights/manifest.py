"""The folder of a download: one sub-folder per repository, and ``download.json``, which lists its complete files::

    {"parts": ["prior_lite", ...],                              # keys of ``cascade.weights.published.PARTS``
     "files": {"stable-cascade-prior/prior_lite/config.json": "<sha256>", ...},
     "repositories": {"owner/name": {"owner--name/prior/config.json": "<sha256>", ...}}}    # other than the published

Listed files are complete, with the Hub's checksums. Other files may be incomplete or outdated.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cascade.weights.published import PARTS

INCOMPLETE = ".incomplete"
LOCK = ".lock"


class DownloadError(Exception):
    """A download is missing, damaged or incomplete. One sentence says what is wrong and what can be done."""


@dataclass(frozen=True)
class Manifest:
    """The content of ``download.json``.

    Attributes:
        parts: keys of ``PARTS``.
        files: sha256 of every file of these parts, by path in the folder.
        repositories: the same for other repositories than the published, by their names.
    """

    parts: list[str]
    files: dict[str, str]
    repositories: dict[str, dict[str, str]] = field(default_factory=dict)

    @staticmethod
    def file(folder: Path) -> Path:
        return folder / "download.json"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's ``download.json``. Raises a DownloadError if it is missing or damaged."""
        file = cls.file(folder)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            parts = [name for name in PARTS if name in content["parts"]]
            if len(parts) != len(content["parts"]):
                raise ValueError("an unknown part")
            files = {path: content["files"][path] for name in parts for path in PARTS[name].paths}
            others = {name: dict(listed) for name, listed in content.get("repositories", {}).items()}
            return cls(parts, files, others)
        except FileNotFoundError:
            raise DownloadError(f"{folder} holds no complete download: run scripts/download-weights first.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DownloadError(f"{file} is damaged: delete it, and run scripts/download-weights again.") from None

    def updated(self, newer: "Manifest") -> "Manifest":
        """This manifest with the newer one's parts, which replace parts of the same components."""
        replaced = {PARTS[name].component for name in newer.parts}
        parts = [*(name for name in self.parts if PARTS[name].component not in replaced), *newer.parts]
        files = {**self.files, **newer.files}
        listed = {path: files[path] for name in parts for path in PARTS[name].paths}
        return Manifest(parts, listed, {**self.repositories, **newer.repositories})

    def write(self, folder: Path) -> None:
        scratch = folder / ".download.json"
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        scratch.replace(self.file(folder))


def remove_download(folder: Path) -> None:
    """Delete every file that a download may have written, then the empty folders. Other files stay."""
    files = [folder / path for part in PARTS.values() for path in part.paths]
    with contextlib.suppress(DownloadError):
        files += [folder / path for listed in Manifest.read(folder).repositories.values() for path in listed]
    Manifest.file(folder).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    for file in files:
        for found in (file, *file.parent.glob(f"{file.name}.*{INCOMPLETE}")):
            found.unlink(missing_ok=True)
    # The deepest first, and the folder itself last.
    parents = {parent for file in files for parent in file.parents if parent.is_relative_to(folder)}
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            parent.rmdir()


def amount(size: int) -> str:
    """A number of bytes as text, in GB or MB (powers of 1000)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
