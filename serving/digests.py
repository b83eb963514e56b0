"""The sha256 of files that requests use again and again."""

from functools import lru_cache
from pathlib import Path

from cascade.weights.hashing import sha256


def digest(file: Path) -> str:
    """The sha256 of a file. Kept until the file changes, because a gigabyte takes 0.7 s.

    Raises:
        OSError: it cannot be read.
    """
    found = file.stat()
    return _digest(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(64)
def _digest(file: Path, *state: int) -> str:
    """state: by which the file is known to be the same."""
    return sha256(file)
