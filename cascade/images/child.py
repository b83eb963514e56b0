"""The process that decodes pictures: `reading` starts it, and asks it for one picture after the other.

A decoder is one call into C, which hears no cancellation, and what a stranger sends may keep it busy for minutes, take
gigabytes or crash it. Here it may: the kernel ends the process when its time is over and refuses it memory, and whoever
waits for it can end it at any moment.

Each side sends JSON, and pixels as they are. First, a file is asked for; the answer is the size of the picture. Then that
picture is asked for, in a size; the answer is its mode, and the pixels, band by band. An answer may be an error instead.
"""

import contextlib
import json
import logging
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import AvifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - see main

from cascade.images.bands import bands_of
from cascade.images.colours import DamagedError, PictureError
from cascade.images.decoding import MOST_PIXELS, PictureFile

# Of all cores together. The largest pictures take 1 to 5 s, depending on the format.
MOST_CPU_SECONDS = 8
# By the clock, for a machine that is busy with something else.
MOST_SECONDS = 40
# Of memory, beside the 4 bytes a pixel that a picture takes.
MOST_BYTES = 400_000_000
# Bytes that this process may have reserved once, and go on to the next picture; at its start it has 30 MB.
USED_UP = 2**28
# Each thread has a stack and, for a large picture, buffers.
AVIF_THREADS = 4
# A PNG file may have a colour profile, or a text, of this size; Pillow would refuse the picture from 1 MiB on.
MOST_PNG_TEXT = 2**24


class Logs(logging.Handler):
    """Keeps what is logged, to be logged by the process that asked for the picture."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """Serve the connection whose file descriptor is the last argument, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes of a terminal
    # Python's errors go on to the log; what decoders write about a file, with pieces of it, does not.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = MOST_PNG_TEXT
    AvifImagePlugin.DEFAULT_MAX_THREADS = AVIF_THREADS
    Image.preinit()  # with the plugins imported above all of `FORMATS`; at the first other one, Pillow would import 40
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory is short, the kernel ends this process first
    logs = Logs()
    logging.getLogger("cascade").addHandler(logs)
    with Connection(int(sys.argv[-1])) as connection, contextlib.suppress(EOFError, ConnectionError):
        while not is_used_up():
            asked = json.loads(connection.recv_bytes())
            limit_time(MOST_CPU_SECONDS, MOST_SECONDS)
            try:
                serve(connection, asked, logs)
            except PictureError as error:
                send(connection, {"error": str(error), "last": is_used_up()})
            logs.lines.clear()
            limit_time(0, 0)


def serve(connection: Connection, asked: dict[str, Any], logs: Logs) -> None:
    """Send the size of a picture, and then the picture in the size that is asked for.

    Raises:
        PictureError: it cannot be read.
    """
    before = memory()
    limit_memory(math.inf)  # of WebP, opening reserves what decoding takes
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(asked["path"], "rb"))
        except OSError as error:
            raise PictureError(f"{asked['name']} cannot be opened: {error.strerror}.") from error
        picture = PictureFile(file, asked["name"])
        allowed = 4 * picture.pixels + MOST_BYTES
        limit_memory(before.get("VmData", math.inf) + allowed)
        send(connection, {"size": guarded(picture, picture.size, allowed, before)})
        options = json.loads(connection.recv_bytes())
        image = guarded(picture, lambda: picture.decode(**options), allowed, before)
    send(connection, {"mode": image.mode, "size": image.size, "logs": logs.lines, "last": is_used_up()})
    for top, bottom in bands_of(image.size):
        connection.send_bytes(image.crop((0, top, image.width, bottom)).tobytes())


def guarded(picture: PictureFile, decode: Callable[[], Any], allowed: int, before: dict[str, int]) -> Any:
    """What `decode` returns.

    Raises:
        PictureError: it fails, perhaps for want of memory.
    """
    more = f"more memory than {allowed // 10**6} MB to be decoded"
    try:
        return decode()
    except MemoryError as error:
        raise PictureError(f"{picture.name} needs {more}.") from error
    except DamagedError as error:
        if memory().get("VmPeak", 0) - before.get("VmSize", 0) > MOST_BYTES:
            raise PictureError(f"{str(error).removesuffix('.')}, or needs {more}.") from error
        raise


def memory() -> dict[str, int]:
    """Bytes of this process by the names of Linux; elsewhere nothing."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Vm")}


def is_used_up() -> bool:
    """Whether this process has held a large picture. What decoders and libraries keep of it goes with the process."""
    return memory().get("VmPeak", 0) > USED_UP


def limit_time(cpu: float, clock: float) -> None:
    """End this process after so many seconds, whatever it does: by signals that it does not handle. 0: never."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, clock)


def limit_memory(most: float) -> None:
    """Refuse this process more bytes than these, or than it was started with."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (most, hard) if bound not in (math.inf, resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds, default=resource.RLIM_INFINITY), hard))


def send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())
