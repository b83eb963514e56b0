"""Reads adapters' files: a safetensors file, a folder in PEFT's form, or either of these in a tar or a zip.

Tensors are read into memory, once. Pickles are refused, by content. A safetensors file in an archive is unpacked into a
temporary file of its size, which is removed after reading.
"""

import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.weights import blocks
from cascade.weights.blocks import DTYPES
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora.whole import clause, whole_networks
from cascade.weights.names import PICKLES, SUFFIX
from cascade.weights.reading import pickle_error, read_header, unreadable

# Maximum bytes of a file, and of all files in an archive. The largest adapters, differences of all weights, have 7 GB for
# Stage C, but nobody shares those.
MOST = 4_000_000_000
MOST_JSON = 4_000_000
# Of a tar's headers: a long name, or PAX's records. tarfile reads each whole, and a small compressed file may hold gigabytes.
MOST_HEADER = 1_000_000
MOST_MEMBERS = 20_000
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
# Bytes of a member that are unpacked at a time.
BLOCK = 1 << 20
PEFT_CONFIG = "adapter_config.json"
# Sub-folders that may hold an adapter of one network.
INNER = ("prior", "decoder", "unet", "text_encoder")
# JSON files that other programs put beside adapters, and that are not needed.
OTHER_JSON = ("lycoris_config.json", "config.json", "metadata.json")


@dataclass(frozen=True, eq=False)
class Stored:
    """One safetensors file.

    Attributes:
        name: its name and folder, within what was read.
        tensors: by key, as stored. They are parts of one block of memory.
        metadata: its texts by name.
        runs: the values of all tensors of floating point again: those of neighbours of one dtype are one tensor (n).
    """

    name: PurePosixPath
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    runs: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Package:
    """The content of an adapter's file, folder or archive.

    Attributes:
        path: its path.
        files: its safetensors files, one or several.
        documents: the contents of its JSON files, and of those beside a single file, by name.
    """

    path: Path
    files: tuple[Stored, ...]
    documents: Mapping[PurePosixPath, bytes]

    def config(self, file: Stored) -> Mapping[str, Any] | None:
        """PEFT's configuration beside a file.

        Raises:
            WeightsError: it is not a JSON object.
        """
        name = file.name.parent / PEFT_CONFIG
        if name not in self.documents:
            return None
        return json_object(f"{self.path}: {shortened(name, 80)}", self.documents[name])

    @property
    def stem(self) -> str:
        """The adapter's name."""
        name = self.path.name
        for ending in (SUFFIX, ".tar.gz", ".tgz", ".tar", ".zip"):
            name = name.removesuffix(ending)
        return name


class _Header(tarfile.TarInfo):
    """A tar's header, refused if it announces a larger one than any archive needs."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        found = super().frombuf(buf, encoding, errors)
        if found.type in HEADERS and found.size > MOST_HEADER:
            # Not a HeaderError: after the first member, tarfile would take it for the end of the archive.
            raise tarfile.TarError(f"a header has over {MOST_HEADER // 1_000_000} MB")
        return found


def read(path: Path) -> Package:
    """Read a path. For a single file, also reads PEFT's JSON file and the JSON file of the same name beside it.

    Raises:
        WeightsError: the path does not exist or has no adapter; a file is damaged or too large; or there are several
            adapters.
    """
    try:
        if path.is_dir():
            return _checked(path, _folder(path))
        if not path.is_file():
            raise WeightsError(f"There is no file or folder {path}.")
        if _is_tar(path):
            return _checked(path, _tar(path))
        if zipfile.is_zipfile(path):
            return _checked(path, _zip(path))
        return _single(path)
    except OSError as error:
        raise WeightsError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


# A member of a folder or an archive: its name; the file of a safetensors file, or the content of a document, or nothing.
Member = tuple[PurePosixPath, Path | bytes]


def _single(path: Path) -> Package:
    if path.stat().st_size > MOST and (whole := _whole_networks(path)):
        raise WeightsError(f"{path} {clause(whole)}.")
    _check_size(path, path.stat().st_size)
    stored = _stored(path, PurePosixPath(path.name), path)
    documents = {}
    for other in (path.with_suffix(".json"), path.with_name(PEFT_CONFIG)):
        if other.is_file():
            _check_json(other, other.stat().st_size)
            documents[PurePosixPath(other.name)] = other.read_bytes()
    return Package(path, (stored,), documents)


def _whole_networks(path: Path) -> list[str]:
    """The networks that a file holds whole, by its header."""
    try:
        return whole_networks(read_header([path]))
    except WeightsError:
        return []


def _content(file: Path) -> tuple[dict[str, Any], Tensor]:
    """The header of a safetensors file, as JSON has it, and its data, uint8 (n)."""
    with file.open("rb", buffering=0) as opened, ThreadPoolExecutor(blocks.READERS) as pool:
        size = os.fstat(opened.fileno()).st_size
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(length, size)))
        data = torch.empty(max(size - 8 - length, 0), dtype=torch.uint8)
        blocks.finish(blocks.begin(pool, opened.fileno(), 8 + length, data))
    header.pop("__metadata__", None)
    return header, data


def _part(data: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Bytes of a file's data as numbers; a copy if they lie where none of this dtype may."""
    part = data[first:last]
    return (part.clone() if first % dtype.itemsize else part).view(dtype)


def _refused(origin: Path, name: str, start: bytes, error: Exception) -> WeightsError:
    inside = origin if origin.name == name else f"{origin}: {shortened(name, 80)}"
    if name.lower().endswith(PICKLES) or start.startswith((b"PK", b"\x80")):
        return pickle_error(inside)
    if name.lower().endswith(SUFFIX):
        return unreadable(inside, error)
    return WeightsError(f"{inside} is not a safetensors file, the only kind that is opened.")


def _check_size(path: Path, size: int) -> None:
    if size > MOST:
        raise WeightsError(f"{path} has {size / 1e9:.1f} GB; an adapter may have {MOST / 1e9:.0f}.")


def _check_json(where: object, size: int) -> None:
    if size > MOST_JSON:
        raise WeightsError(f"{where} has over {MOST_JSON // 1_000_000} MB, which no settings have.")


def json_object(where: object, content: bytes) -> dict[str, Any]:
    """Parse a document that must be a JSON object.

    Raises:
        WeightsError: it is not one. The sentence begins with `where`.
    """
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not valid JSON: {shortened(error).rstrip('.')}.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{where} is not a JSON object.")
    return found


def _folder(root: Path) -> Iterator[Member]:
    for folder in (root, *(root / name for name in INNER)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file():
                name = PurePosixPath(file.relative_to(root).as_posix())
                size = file.stat().st_size
                if not _is_wanted(root, name.as_posix(), size):
                    yield name, b""
                    continue
                _check_size(file, size)
                yield name, file if name.suffix.lower() == SUFFIX else file.read_bytes()


def _is_wanted(origin: Path, name: str, size: int) -> bool:
    """Whether a member of a folder or archive is to be read; called before it is read."""
    ending = PurePosixPath(name).suffix.lower()
    if ending == ".json":
        _check_json(f"{origin}: {shortened(name, 80)}", size)
    return ending in (SUFFIX, ".json")


def _is_tar(path: Path) -> bool:
    """Whether this is a tar, compressed or not. True for a damaged one."""
    try:
        tarfile.open(path, tarinfo=_Header).close()
    except (tarfile.ReadError, tarfile.CompressionError):
        return False
    except (tarfile.TarError, EOFError):
        return True
    return True


def _tar(path: Path) -> Iterator[Member]:
    try:
        with tarfile.open(path, tarinfo=_Header) as archive:
            left = MOST
            for count, member in enumerate(archive):
                _check_count(path, count)
                if member.issparse():  # 11 kB would hold 3 GB of zeros
                    raise tarfile.TarError(f"{shortened(member.name, 80)} is a sparse file")
                if member.isfile():
                    left -= member.size
                    _check_left(path, left)
                    wanted = _is_wanted(path, member.name, member.size)
                    content = archive.extractfile(member) if wanted else None
                    yield from _unpacked(PurePosixPath(member.name), content, member.size)
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path} is a damaged tar file: {shortened(error).rstrip('.')}.") from error


def _zip(path: Path) -> Iterator[Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            left = MOST
            for count, member in enumerate(archive.infolist()):
                _check_count(path, count)
                if not member.is_dir():
                    left -= member.file_size
                    _check_left(path, left)
                    wanted = _is_wanted(path, member.filename, member.file_size)
                    content = archive.open(member) if wanted else None
                    yield from _unpacked(PurePosixPath(member.filename), content, member.file_size)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is a damaged or encrypted zip file: {shortened(error).rstrip('.')}.") from error


def _unpacked(name: PurePosixPath, content: IO[bytes] | None, size: int) -> Iterator[Member]:
    """A member of an archive, which announces `size` bytes; None: it is not wanted."""
    if content is None:
        yield name, b""
        return
    with content:
        if name.suffix.lower() != SUFFIX:
            yield name, content.read(size)
            return
        with tempfile.NamedTemporaryFile(prefix="cascade-lora-", suffix=SUFFIX) as file:
            left = size
            while left and (block := content.read(min(BLOCK, left))):
                left -= file.write(block)
            file.flush()
            yield name, Path(file.name)


def _check_count(path: Path, count: int) -> None:
    if count >= MOST_MEMBERS:
        raise WeightsError(f"{path} holds over {MOST_MEMBERS} files; it must hold one adapter.")


def _check_left(path: Path, left: int) -> None:
    if left < 0:
        raise WeightsError(f"{path} holds over {MOST / 1e9:.0f} GB; an adapter may have no more.")


def _checked(path: Path, members: Iterator[Member]) -> Package:
    files: list[Stored] = []
    documents: dict[PurePosixPath, bytes] = {}
    pickles: list[PurePosixPath] = []
    for name, content in members:
        if any(part.startswith(("._", "__MACOSX")) for part in name.parts):
            continue
        ending = name.suffix.lower()
        if isinstance(content, Path):
            files.append(_stored(path, name, content))
        elif ending == ".json" and name.name not in OTHER_JSON:
            documents[name] = content
        elif ending in PICKLES:
            pickles.append(name)
    if not files:
        if pickles:
            raise pickle_error(f"{path}: {shortened(pickles[0], 80)}")
        raise WeightsError(f"{path} holds no safetensors file; it must hold one adapter.")
    package = Package(path, tuple(files), documents)
    if len(files) > 1 and any(package.config(file) is None for file in files):
        names = shortened(", ".join(str(file.name) for file in files))
        raise WeightsError(f"{path} holds {len(files)} safetensors files, {names}; it must hold one adapter.")
    return package


def _stored(origin: Path, name: PurePosixPath, file: Path) -> Stored:
    """A safetensors file. origin: what it is part of.

    It is copied into memory: if a memory-mapped file were changed meanwhile, its tensors would change, or the process would
    end.
    """
    try:
        with safe_open(file, framework="pt") as opened:  # checks the header
            header, data = _content(file)
            places = {key: (one["dtype"], *one["data_offsets"]) for key, one in header.items()}
            tensors = {}
            for key in opened.keys():  # noqa: SIM118 (the file is no mapping)
                kind, first, last = places[key]
                if kind in DTYPES:
                    tensors[key] = _part(data, first, last, DTYPES[kind]).view(header[key]["shape"])
                else:  # integers, which are few, and what is refused
                    tensors[key] = opened.get_tensor(key).clone()
            return Stored(name, tensors, opened.metadata() or {}, list(_runs(data, places.values())))
    except (SafetensorError, OSError, EOFError, ValueError, RuntimeError, LookupError) as error:
        with file.open("rb") as opened:
            raise _refused(origin, name.as_posix(), opened.read(4), error) from error


def _runs(data: Tensor, places: Iterable[tuple[str, int, int]]) -> Iterator[Tensor]:
    """The values of neighbouring tensors of one dtype. places: of each tensor, its dtype and its bytes of the data."""
    ordered = sorted(places, key=lambda place: place[1:])  # without gaps
    for kind, run in groupby(ordered, key=lambda place: place[0]):
        if kind in DTYPES and DTYPES[kind].is_floating_point:
            ends = [end for _, *both in run for end in both]
            yield _part(data, ends[0], ends[-1], DTYPES[kind])
