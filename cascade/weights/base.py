"""Reads the weights that a model was loaded with again, so that changed weights can be restored exactly.

A copy would take as much memory as the networks. So several threads read the files again, into pinned buffers, from which
a GPU copies at its full rate.
"""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.networks.eight_bits import EightBits, scale_of
from cascade.weights import blocks
from cascade.weights.errors import WeightsError, readable

# Maximum bytes that are read ahead, and of those that are on their way to the GPU, unless one tensor has more. Torch keeps
# pinned memory for later, so what is needed once stays.
AHEAD = 128 << 20

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
        with readable(network):
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


def _header(path: Path) -> dict[str, _Stored]:
    """The places of a file's tensors. The file was read before, so it is complete."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content: dict[str, Any] = json.loads(file.read(length))
    content.pop("__metadata__", None)
    return {
        name: _Stored(
            path, 8 + length + one["data_offsets"][0], _size(one), blocks.DTYPES[one["dtype"]], tuple(one["shape"])
        )
        for name, one in content.items()
        if one["dtype"] in blocks.DTYPES
    }


def _size(one: Mapping[str, Any]) -> int:
    start, stop = one["data_offsets"]
    return stop - start


class _Reading(NamedTuple):
    """A tensor that is being read."""

    name: str
    stored: _Stored
    memory: Tensor
    begun: list[Future[None]]


def _read_ahead(wanted: Sequence[tuple[str, _Stored]], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Read tensors in order, each into new memory. torch's allocator reuses pinned memory when copies from it are done."""
    pinned = device.type == "cuda"
    with contextlib.ExitStack() as stack:
        paths = {stored.path for _, stored in wanted}
        files = {path: stack.enter_context(path.open("rb", buffering=0)).fileno() for path in paths}
        pool = ThreadPoolExecutor(blocks.READERS)
        stack.callback(pool.shutdown, cancel_futures=True)
        uploads = _Uploads(device)
        ahead: deque[_Reading] = deque()
        size = 0
        for name, stored in wanted:
            while ahead and size + stored.size > AHEAD:
                size -= ahead[0].stored.size
                yield _next(ahead, uploads)
            memory = torch.empty(stored.size, dtype=torch.uint8, pin_memory=pinned)
            begun = blocks.begin(pool, files[stored.path], stored.start, memory)
            ahead.append(_Reading(name, stored, memory, begun))
            size += stored.size
        while ahead:
            yield _next(ahead, uploads)


def _next(ahead: "deque[_Reading]", uploads: "_Uploads") -> tuple[str, Tensor]:
    name, stored, memory, begun = ahead.popleft()
    try:
        blocks.finish(begun)
    except EOFError as error:
        raise WeightsError(f"{stored.path} is shorter than when it was loaded; load the model again.") from error
    return name, uploads.upload(memory.view(stored.dtype).view(stored.shape))


class _Uploads:
    """Copies tensors to a device. On a GPU, no call waits for the copy, but for earlier ones if they have over `AHEAD` bytes:
    a GPU that is slower than the disk would make pinned memory grow without bounds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: deque[tuple[int, torch.cuda.Event]] = deque()
        self._size = 0

    def upload(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        while self._copies and self._size + tensor.nbytes > AHEAD:
            size, done = self._copies.popleft()
            done.synchronize()
            self._size -= size
        there = tensor.to(self.device, non_blocking=True)
        self._copies.append((tensor.nbytes, torch.cuda.current_stream(self.device).record_event()))
        self._size += tensor.nbytes
        return there
