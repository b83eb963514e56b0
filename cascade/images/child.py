"""The process that decodes pictures. `reading` starts it, and sends it one picture after the other.

A decoder is one call into C, which cannot be cancelled. An untrusted file may keep it busy for minutes, take gigabytes or
crash it. So decoders run in a process whose CPU time and memory the kernel limits, and which `reading` can kill at any time.

Protocol: messages are JSON, pixels are raw bytes. The first request names a file; the answer is the picture's size. The
second request names a target size; the answer is the picture's mode and size, then its pixels, band by band. Each answer may
be an error instead.
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

# CPU time of all cores together. The largest pictures take 1 to 5 s, depending on the format.
MOST_CPU_SECONDS = 8
# Wall-clock time, longer because the machine may be busy with other work.
MOST_SECONDS = 40
# Memory, in addition to the picture's own 4 bytes per pixel.
MOST_BYTES = 320_000_000
# A process that has ever reserved more bytes than this ends after its picture. It starts with 30 MB.
USED_UP = 2**28
# Each thread has a stack and, for a large picture, buffers.
AVIF_THREADS = 4
# The largest colour profile or text of a PNG file, in bytes. By default, Pillow rejects pictures with more than 1 MiB.
MOST_PNG_TEXT = 2**24


class Logs(logging.Handler):
    """Collects log messages. The parent process logs them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """Serve the connection whose file descriptor is the last argument, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all processes of a terminal
    # Python's errors still reach the log. Decoders' messages do not, because they contain parts of the file.
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = MOST_PNG_TEXT
    AvifImagePlugin.DEFAULT_MAX_THREADS = AVIF_THREADS
    Image.preinit()  # registers `FORMATS`, with the plugins imported above. Otherwise Pillow may import 40 plugins later.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if the machine runs out of memory, the kernel kills this process first
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
    """Send the size of a picture, then the picture in the requested size.

    Raises:
        PictureError: it cannot be read.
    """
    before = memory()
    limit_memory(math.inf)  # opening a WebP file reserves the memory for decoding
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
    """Return `decode()`.

    Args:
        picture: the picture that is decoded.
        decode: decodes it.
        allowed: the limit of memory in bytes, for the error.
        before: `memory()` before the file was opened.

    Raises:
        PictureError: it fails. The sentence says if memory may be the reason.
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
    """This process's virtual memory sizes in bytes, by their names in /proc/self/status; empty except on Linux."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Vm")}


def is_used_up() -> bool:
    """Whether this process should end, because it has held a large picture: decoders and libraries keep memory after it."""
    return memory().get("VmPeak", 0) > USED_UP


def limit_time(cpu: float, clock: float) -> None:
    """Set timers that kill this process after seconds of CPU and of wall-clock time, by unhandled signals. 0: never."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, clock)


def limit_memory(most: float) -> None:
    """Limit this process's data to `most` bytes, or to the limit that it was started with if that is lower."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [bound for bound in (most, hard) if bound not in (math.inf, resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds, default=resource.RLIM_INFINITY), hard))


def send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())
