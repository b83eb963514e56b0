"""What kind of error it is: memory that does not suffice, or a GPU that is lost."""

import torch

OUT_OF_MEMORY = (
    "out of memory",  # CUDA's own, by torch's allocator, by a graph's instantiation, by Triton; and Metal's
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9 says more precisely which: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED
    "can't allocate memory",  # torch's allocator on a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory does not suffice.

    Only torch's own allocator raises `torch.OutOfMemoryError`; cuBLAS and cuDNN raise RuntimeError when they cannot
    allocate their workspaces, and a CUDA graph's instantiation raises `torch.AcceleratorError`.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def is_lost(device: torch.device) -> bool:
    """Whether a GPU can't be used any more by this process. Waits for the work that it has.

    After an illegal address, a device-side assert or a failed launch, every call of CUDA fails until the process ends;
    after other errors, such as a lack of memory, the next call succeeds.
    """
    if device.type != "cuda":
        return False
    for _ in range(2):  # the first call may report an error of work launched before
        try:
            torch.cuda.synchronize(device)
            torch.ones(1, device=device).add_(1).item()  # whether work can still be launched
        except RuntimeError as error:
            if is_out_of_memory(error):
                return False
            continue
        return False
    return True
