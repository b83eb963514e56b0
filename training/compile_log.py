"""The file ``compile.log`` in a stage's folder: the output of the process that compiles the stage ahead, locked while it lives.

So a stage that has begun meanwhile can wait for it. A lock of the operating system ends with the process, however it ends.
"""

import contextlib
import fcntl
from pathlib import Path
from typing import TextIO

from training.errors import writing

NAME = "compile.log"


def open_locked(folder: Path) -> TextIO:
    """Opens a stage's file for the output of the process that compiles ahead. The lock is that of all who inherit the file.

    Raises:
        TrainingError: it cannot be opened.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / NAME).open("a+", encoding="utf-8")
    with contextlib.suppress(OSError):  # some file systems have no locks
        fcntl.flock(log, fcntl.LOCK_SH)
    return log


def close(log: TextIO) -> None:
    """Unlocks and closes it, also for those who inherited it: compilers that outlive the process for a moment."""
    with contextlib.suppress(OSError):
        fcntl.flock(log, fcntl.LOCK_UN)
    log.close()


def wait_until_compiled(folder: Path) -> None:
    """Waits until the process that compiles a stage ahead has ended, if there is one.

    Args:
        folder: the stage's.
    """
    file = folder / NAME
    if file.is_file():
        with file.open("a+", encoding="utf-8") as log, contextlib.suppress(OSError):
            fcntl.flock(log, fcntl.LOCK_EX)
