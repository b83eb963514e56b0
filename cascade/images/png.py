"""Writes PNG files in strips of rows, each filtered and deflated by its own thread.

A PNG file has one zlib stream (RFC 1950), which may be cut into any number of IDAT chunks. A strip's part of it ends at a byte
(`zlib.Z_SYNC_FLUSH`), so the parts of several threads can be joined. Every decoder reads the result.

All rows have PNG's filter "Paeth" and are deflated with zlib's strategy for runs: behind the filter, matches of other kinds are
rare. Of eight kinds of pictures of 1024x1024, files had 99 to 102 % of the size of Pillow's, which chooses a filter for each row;
they took 11 to 53 ms of processors, at most 7 ms a strip, and Pillow's 11 to 79 ms (docs/experiments.md).
"""

import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bytes of pixels, about, in a strip.
STRIP = 400_000
# Strips that are deflated at a time.
MOST_THREADS = 8
PAETH = 4
LEVEL = 1  # of zlib; higher ones search longer for matches, which the strategy for runs does not do
RAW = -15  # of zlib: a deflate stream without header and checksum
HEADER = b"\x78\x01"  # of a zlib stream: deflate, a window of 32 KiB, the fastest level


def save_png(image: Image.Image, path: Path, chunks: Iterable[tuple[bytes, bytes]]) -> None:
    """Write a PNG file.

    Args:
        image: RGB, of any size from 1x1.
        path: of the file.
        chunks: types and contents of the chunks before the pixels, such as texts.

    Raises:
        OSError: the file cannot be written.
    """
    header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB, not interlaced
    with path.open("wb") as file:
        file.write(SIGNATURE)
        for kind, content in (
            (b"IHDR", header),
            *chunks,
            *((b"IDAT", part) for part in _stream(image)),
            (b"IEND", b""),
        ):
            file.write(struct.pack(">I", len(content)) + kind)
            file.write(content)
            file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))


def _stream(image: Image.Image) -> Iterator[bytes]:
    """The zlib stream of a picture's rows, in parts."""
    rows = np.asarray(image).reshape(image.height, -1)
    rows = np.concatenate([np.zeros_like(rows[:1]), rows])  # the row above the first one counts as zeros
    step = max(1, STRIP // rows.shape[1])
    strips = [rows[top : top + step + 1] for top in range(0, image.height, step)]
    checksum = zlib.adler32(b"")
    with ThreadPoolExecutor(min(MOST_THREADS, len(strips), os.cpu_count() or 1)) as threads:
        last = len(strips) - 1
        for place, (filtered, part) in enumerate(threads.map(_deflated, strips, (i == last for i in range(last + 1)))):
            checksum = zlib.adler32(filtered, checksum)
            yield (b"" if place else HEADER) + part + (struct.pack(">I", checksum) if place == last else b"")


def _deflated(rows: np.ndarray, last: bool) -> tuple[np.ndarray, bytes]:
    """The filtered rows of a strip, and their part of the deflate stream; `rows` begins with the row above."""
    filtered = paeth(rows)
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW, strategy=zlib.Z_RLE)
    return filtered, stream.compress(filtered) + stream.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


def paeth(rows: np.ndarray) -> np.ndarray:
    """Filter rows of RGB pixels: of each byte, subtract the neighbour that is nearest to left + above - corner (PNG, 9.4).

    Args:
        rows: uint8 (H + 1, 3 W); the first one is the row above.

    Returns:
        uint8 (H, 1 + 3 W); each row begins with the filter's number.
    """
    current, above = rows[1:], rows[:-1]
    left, corner = np.zeros_like(current), np.zeros_like(current)
    left[:, 3:], corner[:, 3:] = current[:, :-3], above[:, :-3]
    # Distances of the estimate from its neighbours. left + above - corner is above - corner away from left, for example.
    to_left = above.astype(np.int16) - corner
    to_above = left.astype(np.int16) - corner
    to_corner = np.abs(to_left + to_above)
    np.abs(to_left, out=to_left)
    np.abs(to_above, out=to_above)
    nearest = np.where(to_above <= to_corner, above, corner)
    np.copyto(nearest, left, where=(to_left <= to_above) & (to_left <= to_corner))
    filtered = np.empty((len(current), 1 + current.shape[1]), np.uint8)
    filtered[:, 0] = PAETH
    np.subtract(current, nearest, out=filtered[:, 1:])
    return filtered
