"""Chooses the memory mode for a model and a GPU.

resident    All networks stay on the GPU.
offload     Networks stay in pinned host memory and are uploaded in turn into one cache on the GPU, which is as large as
            the largest of them. Parts that do not overlap the running network are uploaded while it runs.
stream      The same with a smaller cache. A network that exceeds it keeps as many blocks there as fit. Its other blocks'
            matrices are uploaded into four slots just before the blocks run.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from cascade.running.device import SettingError

MODES = ("auto", "resident", "offload", "stream")
GIB = 2**30
# Small networks that run between or after other networks' steps. They always stay on the device.
ALWAYS = ("vqgan", "previewer")
# Working memory for 1024x1024, in bytes per byte of dtype (multiply by 2 for bfloat16): Stage B's activations, cuBLAS's
# workspaces, and Stage A in tiles. "resident" needs more, for larger pictures.
WORK = int(0.6 * GIB)
RESIDENT_WORK = int(1.0 * GIB)
# Bytes of working memory for Stage A in "stream".
SMALL_WORK = int(0.4 * GIB)


class MemoryMode(NamedTuple):
    """A chosen memory mode.

    Attributes:
        name: one of `MODES` except "auto".
        size: bytes of the cache in "stream"; None: the default of `cache.cache_size`.
    """

    name: str
    size: int | None = None


def choose_memory(mode: str, sizes: Mapping[str, int], available: int, itemsize: int) -> MemoryMode:
    """Choose the memory mode for a model. Only "auto" depends on the sizes.

    Args:
        mode: one of `MODES`.
        sizes: bytes of the networks by name.
        available: bytes of GPU memory that may be used.
        itemsize: bytes per element of the networks' dtype.

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
    """Bytes that can still be allocated on a GPU: its free memory, or less if the process is limited to a fraction of it."""
    with torch.cuda.device(device):
        free, total = torch.cuda.mem_get_info()
        limit = int(torch.cuda.get_per_process_memory_fraction() * total)
    return max(0, min(free, limit - torch.cuda.memory_reserved(device)))


def usable(device: torch.device) -> int:
    """Bytes that new tensors could take on a GPU if torch's cache and all CUDA graphs were freed; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return available(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
