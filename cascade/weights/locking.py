"""A lock that one process at a time holds. The system releases it when the process ends, however it ends."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(file: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file while the block runs. The file and its folder are made, and stay.

    Args:
        file: the lock's file. Its content does not matter.
        busy: called if another process holds the lock. An exception from it is passed on; if it returns, the lock is waited
            for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
