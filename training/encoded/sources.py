"""Captioned pictures to be encoded: WebDataset shards, or a folder of files. Both are read in units, one file of results each."""

import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from training.errors import TrainingError, summary
from training.picture_folder import ENDINGS, Captioned, captioned_pictures

# Pictures of a unit of a folder. With the published text encoder, its results have 220 MB.
UNIT = 1000


class Picture(NamedTuple):
    """A picture's name in messages, its file's content, and its caption."""

    name: str
    content: bytes
    caption: str


@dataclass(frozen=True)
class Unit:
    """Some of the pictures.

    Attributes:
        name: for the file of results; no other unit has it.
        pictures: reads them, in a fixed order.
    """

    name: str
    pictures: Callable[[], Iterator[Picture]]


def units_of(path: Path) -> list[Unit]:
    """The units of a WebDataset shard, of a folder of shards, or of a folder of pictures with captions beside them.

    Raises:
        TrainingError: there is none of these; of a folder of pictures, one has no caption.
    """
    if path.is_file():
        return [Unit(path.stem, partial(read_tar, path))]
    if not path.is_dir():
        raise TrainingError(f"There is no {path}; name a folder of pictures or of tar files, or a tar file.")
    shards = sorted(path.rglob("*.tar"))
    if shards:
        names = ["-".join(shard.relative_to(path).with_suffix("").parts) for shard in shards]
        return [Unit(name, partial(read_tar, shard)) for name, shard in zip(names, shards, strict=True)]
    found = captioned_pictures(path)
    return [
        Unit(f"pictures-{number:05}", partial(read_files, found[number * UNIT : (number + 1) * UNIT]))
        for number in range(-(-len(found) // UNIT))
    ]


def read_files(captioned: list[Captioned]) -> Iterator[Picture]:
    """Reads pictures from files.

    Raises:
        TrainingError: one cannot be read.
    """
    for file, caption in captioned:
        try:
            yield Picture(str(file), file.read_bytes(), caption)
        except OSError as error:
            raise TrainingError(f"{file} cannot be read: {error.strerror or error}.") from error


def read_tar(file: Path) -> Iterator[Picture]:
    """Reads pictures from a WebDataset shard, in which the files of a sample follow each other, and have names that are equal up
    to the first dot of the last part. The caption is ``key.txt``, or ``caption`` in ``key.json``.

    Samples without a picture or a caption are left out.

    Raises:
        TrainingError: the file is damaged, or not a tar file.
    """
    key, sample = "", {}
    try:
        with tarfile.open(file, "r|") as opened:
            for member in opened:
                if not member.isfile():
                    continue
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")
                if str(name.parent / stem) != key:
                    yield from _picture_of(file, key, sample)
                    key, sample = str(name.parent / stem), {}
                ending = f".{ending.lower()}"
                if ending in (*ENDINGS, ".txt", ".json"):
                    sample[ending] = opened.extractfile(member).read()
            yield from _picture_of(file, key, sample)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise TrainingError(f"{file} is damaged, or not a tar file: {summary(error)}.") from error


def _picture_of(file: Path, key: str, sample: dict[str, bytes]) -> Iterator[Picture]:
    """The picture of a sample's files, by ending; none if there is no picture or no caption."""
    endings = [ending for ending in sample if ending in ENDINGS]
    caption = _caption_of(sample)
    if endings and caption is not None:
        yield Picture(f"{key}{endings[0]} of {file}", sample[endings[0]], caption)


def _caption_of(sample: dict[str, bytes]) -> str | None:
    try:
        if ".txt" in sample:
            return sample[".txt"].decode("utf-8-sig").strip()
        found = json.loads(sample[".json"]).get("caption") if ".json" in sample else None
    except (ValueError, AttributeError):  # not UTF-8, not JSON, or not an object
        return None
    return found.strip() if isinstance(found, str) else None
