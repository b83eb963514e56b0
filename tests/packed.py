"""Folders of reference data, packed: all files but README.md in one `files.tar.xz`, without loss.

Random float32 numbers do not compress. Where a program's weights were drawn by torch, the archive has zeros in their place,
and `drawn.json` in it says how to draw them again, see `Draw`. On other processors, the last bit may differ.

    python -m tests.packed unpack tests/fixtures/lora FOLDER
    python -m tests.packed pack FOLDER tests/fixtures/lora    # tensors that its archive knows how to draw are drawn again
"""

import argparse
import io
import json
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ARCHIVE, DRAWN, README = "files.tar.xz", "drawn.json", "README.md"
# Literals are coded by their place in a word of four bytes, like a float32's.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]

TIME = 86400 * 365 * 11
"""Of every file in an archive, in seconds: in 1980, because tests zip files, and ZIP knows no earlier year."""


class Draw(NamedTuple):
    """How a float32 tensor was drawn: mean + scale * a normal distribution's numbers.

    Attributes:
        seed: of torch's generator on a CPU.
        skip: how many 32-bit numbers were taken from it before.
        scale, mean: of the distribution.
    """

    seed: int
    skip: int
    scale: float
    mean: float

    def numbers(self, count: int) -> Tensor:
        """The tensor, flat."""
        numbers = self.scale * torch.randn(count, generator=generator_at(self.seed, self.skip))
        return self.mean + numbers if self.mean else numbers


Draws = dict[str, dict[str, Draw]]
"""By file and tensor."""


@cache
def folder(variable: str, packed: Path) -> Path:
    """The folder that an environment variable names, else a packed one's files, which are deleted when the process ends."""
    if given := os.environ.get(variable):
        return Path(given)
    _kept.append(tempfile.TemporaryDirectory(prefix="fixtures-"))
    target = Path(_kept[-1].name)
    unpack(packed, target)
    return target


_kept: list[tempfile.TemporaryDirectory[str]] = []


def unpack(packed: Path, target: Path) -> None:
    """Writes all files of a packed folder to another one."""
    with tarfile.open(packed / ARCHIVE) as archive:
        archive.extractall(target, filter="data")
    for file, draws in read_draws((target / DRAWN).read_bytes()).items():
        content = bytearray((target / file).read_bytes())
        for name, place in tensors(content):
            if name in draws:
                content[place] = data(draws[name], place)
        (target / file).write_bytes(content)
    (target / DRAWN).unlink()
    shutil.copyfile(packed / README, target / README)


def pack(source: Path, packed: Path, draws: Draws) -> None:
    """Packs a folder. Tensors that equal their draws are drawn again, all others are stored."""
    used: Draws = {}
    contents: dict[str, bytes] = {}
    for path in sorted(path for path in source.rglob("*") if path.is_file() and path != source / README):
        file, content = path.relative_to(source).as_posix(), bytearray(path.read_bytes())
        for name, place in tensors(content) if file in draws else ():
            if name in draws[file] and content[place] == data(draws[file][name], place):
                content[place] = bytes(place.stop - place.start)
                used.setdefault(file, {})[name] = draws[file][name]
        contents[file] = bytes(content)
    contents[DRAWN] = json.dumps(used, separators=(",", ":")).encode()
    packed.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / README, packed / README)
    with (
        lzma.open(packed / ARCHIVE, "wb", filters=FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w") as archive,
    ):
        for file, stored in contents.items():
            entry = tarfile.TarInfo(file)
            entry.size, entry.mtime = len(stored), TIME
            archive.addfile(entry, io.BytesIO(stored))


def known_draws(packed: Path) -> Draws:
    """What a packed folder's archive says of drawn tensors; nothing if there is no archive."""
    if not (packed / ARCHIVE).is_file():
        return {}
    with tarfile.open(packed / ARCHIVE) as archive:
        content = archive.extractfile(DRAWN)
        assert content is not None, f"{DRAWN} is a file"
        return read_draws(content.read())


def read_draws(content: bytes) -> Draws:
    """The content of drawn.json."""
    files = json.loads(content)
    return {file: {name: Draw(*draw) for name, draw in draws.items()} for file, draws in files.items()}


_passed: dict[int, tuple[int, Tensor]] = {}
"""By seed, how many numbers were last skipped, and the generator's state then."""


def generator_at(seed: int, skip: int) -> torch.Generator:
    """torch's generator on a CPU after so many 32-bit numbers."""
    generator = torch.Generator().manual_seed(seed)
    before, state = _passed.get(seed, (0, generator.get_state()))
    if before <= skip:
        generator.set_state(state)
    else:
        before = 0
    torch.rand(skip - before, generator=generator)
    if skip:
        _passed[seed] = skip, generator.get_state()
    return generator


def tensors(content: bytes | bytearray) -> Iterator[tuple[str, slice]]:
    """Names and places of the tensors in a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    for name, about in json.loads(content[8:start]).items():
        if name != "__metadata__":
            first, last = about["data_offsets"]
            yield name, slice(start + first, start + last)


def data(draw: Draw, place: slice) -> bytes:
    """A drawn tensor's bytes in a file."""
    return draw.numbers((place.stop - place.start) // 4).numpy().astype("<f4").tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    if given.action == "pack":
        pack(given.source, given.target, known_draws(given.target))
    else:
        unpack(given.source, given.target)


if __name__ == "__main__":
    main()
