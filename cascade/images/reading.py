"""Reads pictures from untrusted files, in a separate process with limits, see `child`.

A picture may take 8 s of CPU time, and 320 MB in addition to its own pixels. The process returns it in the size that the
caller needs. The process starts with the first picture, in 0.1 s. While it waits for the next one, it takes 25 MB.
"""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.images.bands import bands_of
from cascade.images.child import MOST_CPU_SECONDS, MOST_SECONDS
from cascade.images.decoding import LARGE_PIXELS, ORDINARY_PIXELS, Size
from cascade.images.heap import give_back

logger = logging.getLogger(__name__)

# Seconds between polls. A cancellation is raised only between two Python instructions of this thread.
PATIENCE = 0.05
# The process gets an empty package `cascade`. The real __init__ may import torch, which takes seconds.
PROGRAM = """
import sys, types
cascade = types.ModuleType("cascade")
cascade.__path__ = [sys.argv[1]]
sys.modules["cascade"] = cascade
from cascade.images.child import main
main()
"""
# Pixels. Four times the shorter side that CLIP scales images to.
CLIP_SIDE = 4 * 224
PACKAGE = Path(__file__).parent.parent
ENVIRONMENT = {
    # glibc returns freed blocks above this size to the system. By default the limit grows to 32 MB, and Pillow's blocks have
    # 16 MB.
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    # OpenCV needs numpy, whose threads would reserve 200 MB.
    "OPENBLAS_NUM_THREADS": "1",
    "OPENCV_LOG_LEVEL": "SILENT",
}


def read_picture(
    path: Path,
    name: str,
    background: str | None = "white",
    needed: Callable[[int, int], Size] | None = None,
    *,
    mask: bool = False,
) -> Image.Image:
    """Read a picture of any usual format, depth and colour mode, as a viewer shows it.

    It is upright, the first frame of an animation, and its colour profile is applied.

    Args:
        path: the file. Its suffix is ignored.
        name: the picture's name in errors and logs.
        background: colour onto which transparent parts are composited; None: they stay transparent.
        needed: (width, height) of the picture -> (width, height) to return, each at least 1. The picture is scaled to cover
            this size, and what exceeds its aspect ratio is cropped evenly, like `ImageOps.fit`. If it raises, the picture is
            not decoded and the error is passed on. None: the picture's own size.
        mask: read it as a mask: transparent parts are black, and it is scaled without cropping, each pixel the mean of those
            that it covers.

    Returns:
        RGB, of any size from 1x1; RGBA if it has transparency and `background` is None; L for a mask.

    Raises:
        ValueError: the file is not a picture in one of `decoding.FORMATS`, it has more than 64 million pixels, or one side is
            more than 64 times the other; such files are not decoded. Or it is damaged, has 32 bits per channel, or takes
            more time or memory than allowed.
    """
    global _decoder
    with _lock:
        if _decoder is None or not _decoder.alive:  # the kernel may have killed it when memory was short
            _decoder = Decoder()
        try:
            return _decoder.decode(path, name, background, needed, mask)
        finally:
            # Also after an error or a cancellation in this process: the decoder may still be busy with the picture.
            if not _decoder.ready:
                _decoder.close()
                _decoder = None


def image_prompt_size(width: int, height: int) -> Size:
    """The size at which an image prompt is read. A large one is shrunk to four times the size at which CLIP reads it.

    CLIP reads only the square in the middle, so a large picture is cropped to an aspect ratio of at most 2.
    """
    if width * height <= ORDINARY_PIXELS:
        return width, height
    shorter = min(width, height, CLIP_SIDE)
    scale = shorter / min(width, height)
    return min(round(width * scale), 2 * shorter), min(round(height * scale), 2 * shorter)


class Decoder:
    """The process that decodes, and the connection to it.

    Attributes:
        ready: whether the process waits for a picture.
    """

    def __init__(self) -> None:
        self.ready = True
        self.connection, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(PACKAGE), str(descriptor)],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                env={**os.environ, **ENVIRONMENT},
            )

    def decode(
        self,
        path: Path,
        name: str,
        background: str | None,
        needed: Callable[[int, int], Size] | None,
        mask: bool,
    ) -> Image.Image:
        """See `read_picture`."""
        self.ready = False
        try:
            # An absolute path, because the process keeps the working directory that it was started in.
            size = self._ask(path=str(path.absolute()), name=name)["size"]
            if math.prod(size) > LARGE_PIXELS:  # the decoder is about to take 400 MB and more
                give_back()
            options = {"background": background, "needed": None if needed is None else needed(*size), "mask": mask}
            answer = self._ask(**options)
            image = Image.new(answer["mode"], answer["size"])
            for top, bottom in bands_of(image.size):
                pixels = self._receive()
                image.paste(Image.frombytes(image.mode, (image.width, bottom - top), pixels), (0, top))
        except (EOFError, ConnectionError) as error:
            raise ValueError(f"{name} {self._why_it_ended()}.") from error
        for line in answer["logs"]:
            logger.warning("%s", line)
        self.ready = not answer["last"]
        return image

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _ask(self, **question: Any) -> dict[str, Any]:
        self.connection.send_bytes(json.dumps(question).encode())
        answer = json.loads(self._receive())
        if "error" in answer:
            self.ready = not answer["last"]
            raise ValueError(answer["error"])
        return answer

    def _receive(self) -> bytes:
        while not self.connection.poll(PATIENCE):
            pass
        return self.connection.recv_bytes()

    def _why_it_ended(self) -> str:
        ended = self.process.wait()
        if ended == -signal.SIGPROF:
            return f"takes more than {MOST_CPU_SECONDS} s of a processor to decode, which is the limit"
        if ended == -signal.SIGALRM:
            return f"takes more than {MOST_SECONDS} s to decode, which is the limit"
        if ended == -signal.SIGKILL:
            return "needs more memory to be decoded than is free"
        return f"cannot be decoded: its decoder ended with {ended}"


_lock = threading.Lock()
_decoder: Decoder | None = None


def _forget() -> None:
    """After a fork, drop the decoder in the child: it is the parent's, and they would receive each other's pictures."""
    global _lock, _decoder
    if _decoder is not None:
        with contextlib.suppress(OSError):
            _decoder.connection.close()
    _lock, _decoder = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
