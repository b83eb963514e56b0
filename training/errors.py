"""Errors of training: a wrong configuration, wrong data, or a file that cannot be read or written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# Libraries raise these for files that are missing, truncated, of another format, or too large for the disk.
FILE_ERRORS = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, SafetensorError)


class TrainingError(ValueError):
    """The configuration, the data or the model folder is wrong. The message is one sentence for the user."""


def summary(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the name of its class if it has no message."""
    lines = str(error).strip().splitlines()
    line = lines[0].rstrip(" .:") if lines else type(error).__name__
    return line if len(line) <= 200 else line[:200] + "..."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error while ``path`` is written into one sentence, which also tells the free space on the disk.

    Raises:
        TrainingError: the block raised an error that files or a full disk cause.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next(parent for parent in (path, *path.absolute().parents) if os.path.exists(parent))
        free = shutil.disk_usage(there).free / 1e6
        raise TrainingError(
            f"{path} could not be written: {summary(error)}. Its disk has {free:,.0f} MB free."
        ) from error
