"""Work that needs no Python module, begun while Python still imports modules: reading weights, and starting the GPU."""

import contextlib
import ctypes
import os
import threading
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
# Values of CASCADE_DEVICE for which the first GPU is used if there is one.
FIRST_GPU = ("", "auto", "cuda", "cuda:0")


def find_weights() -> Path:
    """The folder named by CASCADE_WEIGHTS, else the published model if it was or is to be downloaded, else the miniature."""
    if os.environ.get("CASCADE_WEIGHTS"):
        return Path(os.environ["CASCADE_WEIGHTS"])
    published = WEIGHTS / "stable-cascade"
    return published if published.is_dir() or os.environ.get("CASCADE_DOWNLOAD") else WEIGHTS / "mini"


def begin() -> None:
    """Begin, on threads. What fails here is tried again, and reported, when the model loads."""
    for work in (read_ahead, start_gpu):
        threading.Thread(target=work, name=work.__name__, daemon=True).start()


def read_ahead() -> None:
    """Ask the system to read the weights into its page cache."""
    for file in sorted(find_weights().rglob("*.safetensors")):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def start_gpu() -> None:
    """Make the first GPU's primary context, which torch uses later. It takes some tenths of a second."""
    if os.environ.get("CASCADE_DEVICE", "") not in FIRST_GPU:
        return
    with contextlib.suppress(OSError, AttributeError):  # no driver
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)
