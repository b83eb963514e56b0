"""Recognises two kinds of errors: the device is out of memory, or the GPU is lost."""

import torch

from cascade.running.waits import one_at_a_time

OUT_OF_MEMORY = (
    "out of memory",  # CUDA (through torch's allocator, a graph's instantiation or Triton) and Metal
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # in cuDNN 9 CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, for example
    "can't allocate memory",  # torch's allocator on a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device is out of memory.

    Only torch's own allocator raises `torch.OutOfMemoryError`. cuBLAS and cuDNN raise RuntimeError if they cannot allocate
    their workspaces, and a CUDA graph's instantiation raises `torch.AcceleratorError`.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def is_lost(device: torch.device) -> bool:
    """Whether this process can no longer use a GPU. Waits until captures of graphs end, and the GPU has finished its work.

    After an illegal address, a device-side assert or a failed launch, every CUDA call fails until the process ends. After
    other errors, such as a lack of memory, the next call succeeds.
    """
    if device.type != "cuda":
        return False
    with one_at_a_time:
        for _ in range(2):  # the first call may report an error of earlier work
            try:
                torch.cuda.synchronize(device)
                torch.ones(1, device=device).add_(1).item()  # raises if no work can be launched
            except RuntimeError as error:
                if is_out_of_memory(error):
                    return False
                continue
            return False
        return True
