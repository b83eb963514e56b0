"""Packs a network's tensors into one pinned buffer on the host, from which uploads run at the bus's full rate."""

import mmap
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.running.waits import one_at_a_time

ALIGNMENT = 256  # bytes; kernels read up to 16 at a time, and cuBLAS chooses its kernel by alignment
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


@dataclass(frozen=True, eq=False)
class _Slice:
    """A tensor, and its offset in bytes from the start of its group."""

    tensor: Tensor
    offset: int


class HostWeights:
    """A network whose tensors are packed in groups: first those that must be on the GPU throughout, then each block's matrices.

    Only matrices are streamed block by block. Other parameters are small, and a bias may be read as late as in the following
    block, see `kernels.stream.Stream`. Networks without such blocks have one group.

    Args:
        network: on the CPU. Its tensors become views of `host`.
        pin: pin `host` in memory. CUDA needs this to copy while the GPU works.

    Attributes:
        host: uint8, on the CPU.
        bounds: group i is host[bounds[i]:bounds[i + 1]].
        blocks: the blocks in the network's order. Block i has group i + 1.

    Raises:
        torch.cuda.CudaError: the memory cannot be pinned.
    """

    def __init__(self, network: nn.Module, *, pin: bool) -> None:
        self.network = network
        self.blocks: list[ResBlock | AttnBlock] = []
        if isinstance(network, StableCascadeUNet):
            self.blocks = [block for block in network.blocks() if isinstance(block, ResBlock | AttnBlock)]
        matrices = [_matrices(block) for block in self.blocks]
        moved = {id(tensor) for group in matrices for tensor in group}
        rest = [tensor for tensor in _tensors(network) if id(tensor) not in moved]
        self._groups, self.bounds = [], [0]
        for group in (rest, *matrices):
            places, size = _lay_out(group)
            self._groups.append(places)
            self.bounds.append(self.bounds[-1] + size)
        self.host = _pages(self.size)
        for i, group in enumerate(self._groups):
            before = [place.tensor.data for place in group]
            self.move(i, self.bytes_of(i))
            for place, data in zip(group, before, strict=True):
                place.tensor.data.copy_(data)
        if pin:
            _pin(self.host)
            unpin = partial(_unpin, self.host, torch.cuda.current_device())
            weakref.finalize(self, one_at_a_time.when_free, unpin).atexit = False

    @property
    def size(self) -> int:
        """Bytes of all groups."""
        return self.bounds[-1]

    def bytes_of(self, group: int) -> Tensor:
        return self.host[self.bounds[group] : self.bounds[group + 1]]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as the host has them, by name: views of `host`, in the parameters' shapes and strides."""
        views = {
            id(place.tensor): _view(place, self.bytes_of(group))
            for group, places in enumerate(self._groups)
            for place in places
        }
        return {name: views[id(parameter)] for name, parameter in self.network.named_parameters()}

    def move(self, group: int, target: Tensor) -> None:
        """Make a group's tensors views of other bytes, uint8, on any device. Copies nothing: the caller fills the bytes."""
        for place in self._groups[group]:
            place.tensor.data = _view(place, target)


def _view(place: _Slice, memory: Tensor) -> Tensor:
    """The bytes of a tensor, in a group's memory, as such a tensor."""
    tensor = place.tensor
    data = memory[place.offset : place.offset + _extent(tensor)].view(tensor.dtype)
    return data.as_strided(tensor.shape, tensor.stride())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _matrices(block: nn.Module) -> list[Tensor]:
    return [tensor for tensor in block.parameters() if tensor.ndim == 2]


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()


def _lay_out(tensors: Iterable[Tensor]) -> tuple[list[_Slice], int]:
    """Aligned offsets for tensors, one after the other, and their total bytes."""
    places: list[_Slice] = []
    size = 0
    for tensor in tensors:
        places.append(_Slice(tensor, size))
        size += aligned(_extent(tensor))
    return places, size


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """Round up to a multiple of `to`."""
    return -(-size // to) * to


def _pages(size: int) -> Tensor:
    """Memory in whole pages. torch's own pinned memory is rounded up to powers of two: 8 GiB for Stage C's 6.7."""
    page = mmap.PAGESIZE
    memory = torch.empty(size + 2 * page, dtype=torch.uint8)
    start = -memory.data_ptr() % page
    return memory[start : start + aligned(size, page)]


def _pin(memory: Tensor) -> None:
    """Pin memory that has been written to. Its pages exist then, so CUDA need not fault them in one by one."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))


def _unpin(memory: Tensor, device: int) -> None:
    torch.cuda.synchronize(device)  # copies from it may be in progress
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
