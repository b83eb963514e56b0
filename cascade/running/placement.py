"""Which memory mode suits a model and a GPU.

resident    all networks stay on the GPU.
offload     networks wait in pinned host memory and are uploaded in turn into one cache on the GPU, as large as the
            largest of them. What fits beside the running network is uploaded meanwhile.
stream      the same with a smaller cache. Of a network that exceeds it, as many blocks as fit stay there; the other
            blocks' matrices are uploaded into four slots just before they are needed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from cascade.running.device import SettingError

MODES = ("auto", "resident", "offload", "stream")
GIB = 2**30
# Small networks that run between or after the steps of others: they always stay on the device.
ALWAYS = ("vqgan", "previewer")
# Working memory for 1024x1024, in bytes per byte of dtype (multiply by 2 for bfloat16): Stage B's activations, cuBLAS's
# workspaces, and Stage A in tiles. In "resident" there is more of it, for larger pictures.
WORK = int(0.6 * GIB)
RESIDENT_WORK = int(1.0 * GIB)
# Bytes for Stage A in "stream".
SMALL_WORK = int(0.4 * GIB)


class MemoryMode(NamedTuple):
    """A memory mode that has been chosen.

    Attributes:
        name: one of `MODES` but "auto".
        size: bytes of the cache in "stream"; None: as few as make sense, see `cache.cache_size`.
    """

    name: str
    size: int | None = None


def choose_memory(mode: str, sizes: Mapping[str, int], available: int, itemsize: int) -> MemoryMode:
    """The memory mode for a model. Only "auto" depends on the sizes.

    Args:
        mode: one of `MODES`.
        sizes: bytes of the networks by name.
        available: bytes of the GPU that may be used.
        itemsize: bytes of the networks' dtype.

    Raises:
        SettingError: there is no such mode.
    """
    if mode not in MODES:
        raise SettingError("memory", mode, f"one of {', '.join(MODES)}")
    if mode != "auto":
        return MemoryMode(mode)
    always = sum(size for name, size in sizes.items() if name in ALWAYS)
    largest = max(size for name, size in sizes.items() if name not in ALWAYS)
    if sum(sizes.values()) + itemsize * RESIDENT_WORK <= available:
        return MemoryMode("resident")
    left = available - always - itemsize * WORK
    return MemoryMode("offload") if largest <= left else MemoryMode("stream", max(left, 0))


def available(device: torch.device) -> int:
    """Bytes of a GPU that can still be allocated: its free memory, or less if the process is limited to a fraction."""
    with torch.cuda.device(device):
        free, total = torch.cuda.mem_get_info()
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # since torch 2.8
            limit = int(torch.cuda.get_per_process_memory_fraction() * total)
            free = min(free, limit - torch.cuda.memory_reserved())
    return max(free, 0)


def usable(device: torch.device) -> int:
    """Bytes of a GPU that tensors could take if torch's cache and all CUDA graphs were given up; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return available(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
