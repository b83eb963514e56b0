"""The metadata of picture files. CASCADE_METADATA decides how much files and logs say about a request."""

import os
from collections.abc import Iterator
from enum import StrEnum

from cascade.images.metadata import Metadata, SourceType
from serving.infotext import infotext
from serving.record import Record

# Characters to which each prompt is cut; shorter lengths are tried until the metadata fits into the format. None: uncut.
# Only a prompt's first 300 tokens, some 1,200 characters, are used.
LENGTHS = (None, 5000, 2500, 1250)


class Detail(StrEnum):
    """The values of CASCADE_METADATA: how much files and logs say about a request."""

    FULL = "full"  # everything
    SETTINGS = "settings"  # no prompts, no digests of input images
    NONE = "none"  # only XMP's DigitalSourceType, which says that a model made the picture

    @classmethod
    def from_environment(cls) -> "Detail":
        """The value of CASCADE_METADATA; full if it is unset or empty.

        Raises:
            ValueError: it has another value.
        """
        value = os.environ.get("CASCADE_METADATA") or cls.FULL.value
        if value not in list(cls):
            raise ValueError(f"CASCADE_METADATA is {value!r}; it must be one of {', '.join(cls)}.")
        return cls(value)


def metadata(record: Record, detail: Detail) -> Iterator[Metadata]:
    """Metadata for a picture's file: everything that `detail` allows, then versions with shorter and shorter prompts."""
    source = SourceType.EDITED if record.edited else SourceType.CREATED
    if detail is Detail.NONE:
        yield Metadata(source)
        return
    allowed = record if detail is Detail.FULL else record.without_texts()
    for length in LENGTHS:
        shown = allowed if length is None else allowed.with_prompts_cut(length)
        yield Metadata(source, shown.to_json(), infotext(shown))
