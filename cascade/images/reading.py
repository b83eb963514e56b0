"""Reading pictures from files that anybody may have sent: in a process of its own, see `child`, within bounds.

A picture is decoded within 8 s of a processor and in at most 400 MB beside its own pixels, and comes back in the size
that is needed of it. The process is started with the first picture, in 0.1 s, and waits for the next one in 25 MB.
"""

import contextlib
import json
import logging
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
from cascade.images.decoding import ORDINARY_PIXELS, Size

logger = logging.getLogger(__name__)

# Seconds. A cancellation reaches a thread between two of its own instructions.
PATIENCE = 0.05
# The package's own __init__ may import all of it, and torch takes seconds: the process gets an empty one.
PROGRAM = """
import sys, types
cascade = types.ModuleType("cascade")
cascade.__path__ = [sys.argv[1]]
sys.modules["cascade"] = cascade
from cascade.images.child import main
main()
"""
# Four times what CLIP scales the shorter side to.
CLIP_SIDE = 4 * 224
PACKAGE = Path(__file__).parent.parent
ENVIRONMENT = {
    # glibc keeps what is freed below this size, which otherwise grows to 32 MB; Pillow's blocks have 16 MB.
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    # Of numpy, which comes with OpenCV: its threads reserve 200 MB.
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
    """Read a picture of any usual format, depth and colour mode, as one sees it in a viewer.

    Upright, the first frame of an animation, its colour profile applied.

    Args:
        path: the file. Its ending does not matter.
        name: what errors and logs call it.
        background: what is transparent is laid on this colour; None: it stays transparent.
        needed: from the picture's (width, height) to those that it is needed in, each at least 1; it is scaled to
            cover them, and what exceeds their shape is cut off evenly, as `ImageOps.fit` does it. What it raises is
            raised, and the picture is not decoded. None: its own size.
        mask: read it as a mask: what is transparent is black, and it is scaled without a cut, each pixel the mean of
            those that it stands for.

    Returns:
        RGB, of any size from 1x1; RGBA if it has transparency that stays; of a mask, L.

    Raises:
        ValueError: the file is no picture of these formats, it has more than 64 million pixels, or one side is more
            than 32 times the other: of those, nothing is decoded. Or it is damaged, has 32 bits a channel, or takes
            more time or memory than is allowed.
    """
    global _decoder
    with _lock:
        if _decoder is None or not _decoder.alive:  # short of memory, the kernel ends it first
            _decoder = Decoder()
        try:
            return _decoder.decode(path, name, background, needed, mask)
        finally:
            # After an error of this side or a cancellation too: the process may not be done with the picture.
            if not _decoder.ready:
                _decoder.close()
                _decoder = None


def image_prompt_size(width: int, height: int) -> Size:
    """The size in which an image prompt of this size is needed: a large one four times as large as CLIP looks at it.

    CLIP sees the square in the middle; of what is more than twice as long, the ends are cut off.
    """
    if width * height <= ORDINARY_PIXELS:
        return width, height
    shorter = min(width, height, CLIP_SIDE)
    scale = shorter / min(width, height)
    return min(round(width * scale), 2 * shorter), min(round(height * scale), 2 * shorter)


class Decoder:
    """The process that decodes, and the connection to it.

    Attributes:
        ready: whether it waits for a picture.
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
            # Absolute: the process keeps the working directory that it was started in.
            size = self._ask(path=str(path.absolute()), name=name)["size"]
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
    """What a fork leaves in the child belongs to the parent: two that ask one process would get each other's pictures."""
    global _lock, _decoder
    if _decoder is not None:
        with contextlib.suppress(OSError):
            _decoder.connection.close()
    _lock, _decoder = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
