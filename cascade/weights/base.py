"""Reads the weights that a model was loaded with again, so that changed weights can be restored to the bit.

A copy would take as much memory as the networks. So several threads read the files again, into pinned buffers, from which
a GPU copies at its full rate.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.networks.eight_bits import EightBits, scale_of
from cascade.weights.errors import WeightsError

# Threads that read ahead, one tensor each.
READERS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}


# A tensor in floating point, or a matrix in 8 bits.
Stored = Tensor | EightBits


class BaseWeights(Protocol):
    """Reads base weights."""

    def read(
        self, network: str, names: Sequence[str], device: torch.device, current: Callable[[str], Stored]
    ) -> Iterator[tuple[str, Stored]]:
        """Tensors of a network, as they were before any change.

        Args:
            network: "prior", "decoder" or "text_encoder".
            names: published names of tensors.
            device: the device of the tensors.
            current: returns a tensor's present value, by name.

        Yields:
            Each name, in order, with its tensor in floating point, or in 8 bits if it is kept so. The caller must not change
            it, and may use it only until the next one is yielded.

        Raises:
            WeightsError: they can no longer be read.
        """


class KeptWeights:
    """Copies tensors when they are first read; they must not have been changed before."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Stored] = {}

    def read(
        self, network: str, names: Sequence[str], device: torch.device, current: Callable[[str], Stored]
    ) -> Iterator[tuple[str, Stored]]:
        """See `BaseWeights`."""
        for name in names:
            if (network, name) not in self._kept:
                self._kept[network, name] = _each(lambda one: one.detach().to("cpu", copy=True), current(name))
            yield name, _each(lambda one: one.to(device), self._kept[network, name])


def _each(change: Callable[[Tensor], Tensor], stored: Stored) -> Stored:
    return change(stored) if isinstance(stored, Tensor) else EightBits(*map(change, stored))


class _Stored(NamedTuple):
    """A tensor's place: bytes of a file."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """Tells whether a file is still the same."""

    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "_State":
        found = path.stat()
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


class FileWeights:
    """Reads the weights again from their files.

    Args:
        files: the safetensors files of each network, with published names, as they were when the network was loaded.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
        self._files = {network: tuple(paths) for network, paths in files.items()}
        self._states = {path: _State.of(path) for paths in self._files.values() for path in paths}
        self._tensors: dict[str, dict[str, _Stored]] = {}

    def read(
        self, network: str, names: Sequence[str], device: torch.device, current: Callable[[str], Stored]
    ) -> Iterator[tuple[str, Stored]]:
        """See `BaseWeights`."""
        try:
            for path in self._files[network]:
                if _State.of(path) != self._states[path]:
                    raise WeightsError(f"{path} has changed since it was loaded; load the model again.")
            if network not in self._tensors:
                self._tensors[network] = {
                    name: one for path in self._files[network] for name, one in _header(path).items()
                }
            stored = self._tensors[network]
            every = [one for name in names for one in (name, scale_of(name)) if one in stored]
            read = _read_ahead([(name, stored[name]) for name in every], device)
            for name in names:
                _, tensor = next(read)
                yield name, EightBits(tensor, next(read)[1]) if scale_of(name) in stored else tensor
        except OSError as error:
            raise WeightsError(f"{error.filename or network} cannot be read: {error.strerror or error}.") from error


def _header(path: Path) -> dict[str, _Stored]:
    """The places of a file's tensors. The file was read before, so it is complete."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content: dict[str, Any] = json.loads(file.read(length))
    content.pop("__metadata__", None)
    return {
        name: _Stored(path, 8 + length + one["data_offsets"][0], _size(one), DTYPES[one["dtype"]], tuple(one["shape"]))
        for name, one in content.items()
        if one["dtype"] in DTYPES
    }


def _size(one: Mapping[str, Any]) -> int:
    start, stop = one["data_offsets"]
    return stop - start


def _read(stored: _Stored, pinned: bool) -> Tensor:
    """Read a tensor into new memory. torch's allocator keeps pinned memory, and reuses it when copies from it are done."""
    memory = torch.empty(stored.size, dtype=torch.uint8, pin_memory=pinned)
    target = memory.numpy()
    descriptor = os.open(stored.path, os.O_RDONLY)
    try:
        done = 0
        while done < stored.size:
            count = os.preadv(descriptor, [memoryview(target[done:])], stored.start + done)
            if not count:
                raise WeightsError(f"{stored.path} is shorter than when it was loaded; load the model again.")
            done += count
    finally:
        os.close(descriptor)
    return memory.view(stored.dtype).view(stored.shape)


def _read_ahead(wanted: Sequence[tuple[str, _Stored]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    pinned = device.type == "cuda"
    pool = ThreadPoolExecutor(READERS)
    ahead: deque[tuple[str, Future[Tensor]]] = deque()
    try:
        for name, stored in wanted:
            if len(ahead) > READERS:
                yield _next(ahead, device)
            ahead.append((name, pool.submit(_read, stored, pinned)))
        while ahead:
            yield _next(ahead, device)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(ahead: "deque[tuple[str, Future[Tensor]]]", device: torch.device) -> tuple[str, Tensor]:
    name, read = ahead.popleft()
    return name, read.result().to(device, non_blocking=True)
