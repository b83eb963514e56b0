"""The error of weights that cannot be used."""

import contextlib
from collections.abc import Iterator


class WeightsError(Exception):
    """A weights file is missing, damaged, of the wrong kind or not the published one.

    The message is one sentence under 400 characters. It names the file and the first problem.
    """


def shortened(text: object, most: int = 160) -> str:
    """A text, such as another library's error, in one line of at most `most` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


@contextlib.contextmanager
def readable(path: object) -> Iterator[None]:
    """Turn an OSError into a WeightsError that names the file, or `path` if the error names none."""
    try:
        yield
    except OSError as error:
        said = shortened(error.strerror or error).rstrip(".")
        raise WeightsError(f"{shortened(error.filename or path)} cannot be read: {said}.") from error
