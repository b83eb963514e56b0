"""Reads bytes of a file into memory with several threads. One thread cannot: copying from the page cache takes it longer than
a GPU takes to copy the same bytes.

The threads take blocks of equal size, not tensors. Else all would wait for the one that reads the largest tensor.
"""

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

READERS = 8
BLOCK = 8 << 20
# Of weights, by safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}


def begin(pool: ThreadPoolExecutor, descriptor: int, start: int, target: Tensor) -> list[Future[None]]:
    """Begin to fill a tensor from a file; `finish` waits for it.

    Args:
        pool: of `READERS` threads.
        descriptor: of the file, open for reading until `finish` has returned.
        start: the first byte's place in the file.
        target: uint8 (n), contiguous, on the CPU.
    """
    memory = memoryview(target.numpy())
    return [
        pool.submit(_fill, descriptor, start + first, memory[first : first + BLOCK])
        for first in range(0, len(memory), BLOCK)
    ]


def finish(begun: Iterable[Future[None]]) -> None:
    """Return when all blocks are read.

    Raises:
        EOFError: the file ends before.
        OSError: it cannot be read.
    """
    for block in begun:
        block.result()


def _fill(descriptor: int, start: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], start + done)
        if not count:
            raise EOFError(f"it ends at byte {start + done}")
        done += count
