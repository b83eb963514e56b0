"""What shortens a start: while Python imports, weights are read and the GPU is woken, and no garbage is looked for."""

import contextlib
import ctypes
import gc
import os
import re
import threading
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def find_weights() -> Path:
    """The folder named by CASCADE_WEIGHTS, else the published model if it was or is to be downloaded, else the miniature."""
    if os.environ.get("CASCADE_WEIGHTS"):
        return Path(os.environ["CASCADE_WEIGHTS"])
    published = WEIGHTS / "stable-cascade"
    return published if published.is_dir() or os.environ.get("CASCADE_DOWNLOAD") else WEIGHTS / "mini"


def begin() -> None:
    """Before the imports: begin to read the weights ahead and to wake the GPU, on threads. What fails here is reported when the
    model loads.

    Until `end`, no garbage is collected. Imports make a million objects and next to no garbage; looking for it took 0.9 s of 5.7.
    """
    gc.disable()
    # As torch does later, but CUDA's driver reads it when it is initialised. Set before there are threads: while one changes the
    # environment, C code in another must not read it.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=read_ahead, name="read ahead", daemon=True).start()
    threading.Thread(target=wake_gpu, name="wake the GPU", daemon=True).start()


def end() -> None:
    """After the imports: collect garbage, but never among what was imported. To do so as Python ends took another 1.3 s."""
    gc.freeze()
    gc.enable()


def read_ahead() -> None:
    """Ask the system to read the weights into its page cache."""
    for file in sorted(find_weights().rglob("*.safetensors")):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def wake_gpu() -> None:
    """Initialise CUDA's driver, and make the primary context of the GPU that CASCADE_DEVICE names; torch uses the same one.

    That takes a second or more, in calls that let Python go on.
    """
    wanted = re.fullmatch(r"auto|cuda(?::(\d+))?", os.environ.get("CASCADE_DEVICE") or "auto")
    if not wanted:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # there is no such driver
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    number = int(wanted[1] or 0)
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
