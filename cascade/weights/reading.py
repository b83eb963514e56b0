"""Safetensors files: finds a component's files, and reads their headers and tensors.

Several threads read a file. They compare checksums before they copy tensors to the GPU.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.networks.eight_bits import is_in_8_bits
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.names import PICKLES, STEMS, SUFFIX, VARIANTS, index_names
from cascade.weights.sums import PIECE, READERS, Piece, divide, read_shares

# (shape, safetensors' name for the dtype) of each tensor of a file, by name.
Header = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Sums:
    """The checksums of a file's pieces, see `cascade.weights.sums`.

    Attributes:
        listed: one checksum per piece.
        where: the file that lists them, for errors.
        least: minimum bytes of a piece.
    """

    listed: Sequence[str]
    where: Path
    least: int = PIECE


def find_weights(folder: Path) -> list[Path]:
    """The safetensors file in a component's folder, or all of its shards; [] if there is none.

    Raises:
        WeightsError: a shard is missing, or there are several files and none has a standard name.
    """
    for stem in STEMS:
        for variant in VARIANTS:
            file = folder / f"{stem}{variant}{SUFFIX}"
            if file.is_file():
                return [file]
            for name in index_names(stem, variant):
                if (folder / name).is_file():
                    return read_index(folder / name)
    others = sorted(file for file in folder.iterdir() if file.suffix.lower() == SUFFIX) if folder.is_dir() else []
    if len(others) > 1:
        names = shortened(", ".join(file.name for file in others))
        raise WeightsError(f"{folder} holds several files of weights, and none has a standard name: {names}.")
    return others


def no_weights(folder: Path) -> WeightsError:
    """The error for a component's folder without a safetensors file."""
    pickles = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICKLES)
    if pickles:
        return pickle_error(pickles[0])
    return WeightsError(f"{folder} has no weights: it should hold {STEMS[0]}{SUFFIX} or {STEMS[1]}{SUFFIX}.")


def pickle_error(path: Path | str) -> WeightsError:
    return WeightsError(f"{path} is a pickle, which can run code when it is read; only safetensors files are opened.")


def read_index(path: Path) -> list[Path]:
    """The shards that an index, ``*.safetensors.index.json``, lists.

    Raises:
        WeightsError: the index is damaged, or a shard is missing, is a pickle or is outside of the index's folder.
    """
    content = read_json(path)
    try:
        names = sorted(set(content["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of shards: it has no 'weight_map' of file names.") from error
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise WeightsError(f"{path} lists {shortened(name)!r}, which is outside of the folder.")
        if file.suffix.lower() != SUFFIX:
            raise pickle_error(file)
        if not file.is_file():
            raise WeightsError(f"{file}, which {path.name} lists, is missing.")
    return files


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises a WeightsError if it is missing or not valid."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing.") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {shortened(error).rstrip('.')}.") from error


def unreadable(path: Path | str, error: Exception) -> WeightsError:
    """The error for a file that cannot be read."""
    return WeightsError(f"{path} is truncated or no safetensors file: {shortened(error).rstrip('.')}.")


def check_header(path: Path) -> None:
    """Make sure that a safetensors file is complete. Reads only the header, whose offsets must match the file's length.

    Raises:
        WeightsError: it is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _slices(files: Iterable[Path]) -> Iterator[tuple[str, Any]]:
    """Name and safetensors' slice of every tensor of some files, which are open until the next is asked for.

    Raises:
        WeightsError: a file is truncated or not a safetensors file.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is not a mapping)
                    yield name, file.get_slice(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error


def read_header(files: Iterable[Path]) -> Header:
    """Shape and dtype of every tensor of some safetensors files, by name.

    Raises:
        WeightsError: a file is truncated or not a safetensors file.
    """
    return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in _slices(files)}


def read_empty(files: Iterable[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files, by name, on the meta device. Reads no weights.

    Raises:
        WeightsError: a file is truncated or not a safetensors file.
    """
    return {
        # The part has the dtype, and no or one element.
        name: torch.empty(one.get_shape(), dtype=one[slice(0) if one.get_shape() else ...].dtype, device="meta")
        for name, one in _slices(files)
    }


def read_tensors(
    files: Iterable[Path],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    sums: Mapping[Path, Sums] | None = None,
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
) -> dict[str, Tensor]:
    """All tensors of some safetensors files, by name.

    Args:
        files: paths.
        device: the tensors' device.
        dtype: the dtype of floating-point tensors; None: as stored. Tensors in 8 bits that have scales stay as they are.
        sums: checksums by file, compared during reading. Files without an entry are not checked.
        change: returns what is kept of some tensors, which are as stored, on the device. One call runs at a time, so that the
            memory that calls need does not add up.

    Raises:
        WeightsError: a file is truncated, not a safetensors file, or differs from its checksums.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= _read_file(path, device, (sums or {}).get(path), change)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
    if dtype is None:
        return tensors
    return {
        key: tensor.to(dtype) if tensor.is_floating_point() and not is_in_8_bits(key, tensors) else tensor
        for key, tensor in tensors.items()
    }


def _read_file(
    path: Path,
    device: str | torch.device,
    sums: Sums | None,
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    pieces = divide(path, sums.least if sums else PIECE)
    # A damaged header can change the number of pieces.
    listed: Sequence[str | None] = [None] * len(pieces)
    if sums is not None:
        if len(sums.listed) != len(pieces):
            raise _damaged(path, pieces[0], sums)
        listed = sums.listed
    changing = Lock()

    def read(share: int) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for piece, expected in list(zip(pieces, listed, strict=True))[share::READERS]:
                stored = {key: file.get_tensor(key) for key in piece.keys}
                if expected is not None and piece.sum(stored.values()) != expected:
                    raise _damaged(path, piece, sums)
                there = {key: tensor.to(device) for key, tensor in stored.items()}
                with changing:
                    read |= change(there)
        return read

    return {key: tensor for share in read_shares(read, len(pieces)) for key, tensor in share.items()}


def _damaged(path: Path, piece: Piece, sums: Sums) -> WeightsError:
    where = f"at {piece.keys[0]}" if piece.keys and not piece.header else "at its beginning"
    return WeightsError(
        f"{path} is damaged {where}: its content differs from the checksums in {sums.where}. Fetch or copy the file again."
    )
