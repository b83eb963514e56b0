"""What training says when the configuration, the data or a file is wrong."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What libraries raise for files that are missing, cut, of another kind or too large for the disk.
FILE_ERRORS = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, SafetensorError)


class TrainingError(ValueError):
    """The configuration, the data or the model folder is wrong. The message is one sentence for the user."""


def summary(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters; the kind of error if it has no message."""
    lines = str(error).strip().splitlines()
    line = lines[0].rstrip(" .:") if lines else type(error).__name__
    return line if len(line) <= 200 else line[:200] + "..."


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while ``path`` is written into a sentence that says how much room the disk has.

    Raises:
        TrainingError: the block raised an error that a file or a full disk causes.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next(parent for parent in (path, *path.absolute().parents) if os.path.exists(parent))
        free = shutil.disk_usage(there).free / 1e6
        raise TrainingError(
            f"{path} could not be written: {summary(error)}. Its disk has {free:,.0f} MB free."
        ) from error
