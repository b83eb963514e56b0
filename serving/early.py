"""What makes a start shorter: weights are read while Python still imports modules, and no garbage is looked for in them."""

import contextlib
import gc
import os
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
    """Before the imports: begin to read the weights ahead, on a thread. What fails here is reported when the model loads.

    Until `end`, no garbage is collected. Imports make a million objects and next to no garbage; looking for it took 0.9 s of 5.7.
    """
    gc.disable()
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=read_ahead, name="read ahead", daemon=True).start()


def end() -> None:
    """After the imports: collect garbage, but never among what was imported. To do so as Python ends took another 1.3 s."""
    gc.freeze()
    gc.enable()


def read_ahead() -> None:
    """Ask the system to read the weights into its page cache."""
    for file in sorted(find_weights().rglob("*.safetensors")):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
