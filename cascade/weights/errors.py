"""What is wrong with weights."""


class WeightsError(Exception):
    """A file of weights is missing, damaged, of the wrong kind or not the one that was published.

    One sentence, under 400 characters, names the file and the first thing that is wrong with it.
    """


def shortened(text: object, most: int = 160) -> str:
    """What another library says, in one line and no longer than `most` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
