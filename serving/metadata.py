"""What files, and logs, say about a request: CASCADE_METADATA decides how much."""

import os
from collections.abc import Iterator
from enum import StrEnum

from cascade.images.metadata import Metadata, SourceType
from serving.infotext import infotext
from serving.record import Record

# Characters of each prompt, where a format has no room for longer ones; None: all. The text encoder reads 77 tokens,
# some 400 characters.
LENGTHS = (None, 5000, 2500, 1250)


class Detail(StrEnum):
    """How much files and logs may say about a request: the values of CASCADE_METADATA."""

    FULL = "full"  # all
    SETTINGS = "settings"  # no prompts, no digests of input images
    NONE = "none"  # only that the picture is a model's, as XMP's DigitalSourceType

    @classmethod
    def from_environment(cls) -> "Detail":
        """The value of CASCADE_METADATA; full where it is not set or empty.

        Raises:
            ValueError: it has another value.
        """
        value = os.environ.get("CASCADE_METADATA") or cls.FULL.value
        if value not in list(cls):
            raise ValueError(f"CASCADE_METADATA is {value!r}; it must be one of {', '.join(cls)}.")
        return cls(value)


def metadata(record: Record, detail: Detail) -> Iterator[Metadata]:
    """What the file of a picture says: all that `detail` allows; then, for formats with less room, shorter prompts."""
    source = SourceType.EDITED if record.edited else SourceType.CREATED
    if detail is Detail.NONE:
        yield Metadata(source)
        return
    allowed = record if detail is Detail.FULL else record.without_texts()
    for length in LENGTHS:
        shown = allowed if length is None else allowed.with_prompts_cut(length)
        yield Metadata(source, shown.to_json(), infotext(shown))
