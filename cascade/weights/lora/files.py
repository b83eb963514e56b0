"""Reads adapters' files: a safetensors file, a folder in PEFT's form, or either of these in a tar or a zip.

Everything is read into memory. Pickles are refused, by content. No part of an archive is written to disk.
"""

import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.names import PICKLES, SUFFIX
from cascade.weights.reading import pickle_error, unreadable

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
# Threads that read a file of so many bytes.
READERS = 8
LARGE = 16 << 20
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
        tensors: by key, as stored.
        metadata: its texts by name.
    """

    name: PurePosixPath
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


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


def _single(path: Path) -> Package:
    _check_size(path, path.stat().st_size)
    name = PurePosixPath(path.name)
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
        threads = READERS if path.stat().st_size >= LARGE else 1
        stored = Stored(name, _copies(path, keys, threads), metadata)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        with path.open("rb") as file:
            raise _refused(path, path.name, file.read(4), error) from error
    documents = {}
    for other in (path.with_suffix(".json"), path.with_name(PEFT_CONFIG)):
        if other.is_file():
            _check_json(other, other.stat().st_size)
            documents[PurePosixPath(other.name)] = other.read_bytes()
    return Package(path, (stored,), documents)


def _copies(path: Path, keys: Sequence[str], threads: int) -> dict[str, Tensor]:
    """The tensors of a file, in its order. They are copies: if a memory-mapped file were changed meanwhile, the tensors would
    change, or the process would end.
    """

    def read(share: int) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in keys[share::threads]}

    with ThreadPoolExecutor(threads) as pool:
        found = {key: tensor for share in pool.map(read, range(threads)) for key, tensor in share.items()}
    return {key: found[key] for key in keys}


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


def _folder(root: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    for folder in (root, *(root / name for name in INNER)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file():
                name = PurePosixPath(file.relative_to(root).as_posix())
                size = file.stat().st_size
                wanted = _is_wanted(root, name.as_posix(), size)
                if wanted:
                    _check_size(file, size)
                yield name, file.read_bytes() if wanted else b""


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


def _tar(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
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
                    yield PurePosixPath(member.name), b"" if content is None else content.read()
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError) as error:
        raise WeightsError(f"{path} is a damaged tar file: {shortened(error).rstrip('.')}.") from error


def _zip(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            left = MOST
            for count, member in enumerate(archive.infolist()):
                _check_count(path, count)
                if not member.is_dir():
                    left -= member.file_size
                    _check_left(path, left)
                    wanted = _is_wanted(path, member.filename, member.file_size)
                    content = b""
                    if wanted:
                        with archive.open(member) as file:
                            content = file.read(member.file_size)
                    yield PurePosixPath(member.filename), content
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is a damaged or encrypted zip file: {shortened(error).rstrip('.')}.") from error


def _check_count(path: Path, count: int) -> None:
    if count >= MOST_MEMBERS:
        raise WeightsError(f"{path} holds over {MOST_MEMBERS} files; it must hold one adapter.")


def _check_left(path: Path, left: int) -> None:
    if left < 0:
        raise WeightsError(f"{path} holds over {MOST / 1e9:.0f} GB; an adapter may have no more.")


def _checked(path: Path, members: Iterator[tuple[PurePosixPath, bytes]]) -> Package:
    files, documents, pickles = [], {}, []
    for name, content in members:
        if any(part.startswith(("._", "__MACOSX")) for part in name.parts):
            continue
        ending = name.suffix.lower()
        if ending == SUFFIX:
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


def _stored(path: Path, name: PurePosixPath, content: bytes) -> Stored:
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _refused(path, name.as_posix(), content[:4], error) from error
    return Stored(name, tensors, metadata)
