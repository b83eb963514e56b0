"""Files that Pillow reads but cannot write: profiles, PNG and TIFF of unusual depths. Also the fixtures' descriptions."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures" / "pictures"
D50 = (0.9642, 1.0, 0.8249)
# XYZ, adapted to D50, of the red, green and blue of Display P3 and of sRGB.
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))


def fixture(name: str) -> bytes:
    """The content of a fixture, decompressed if its name ends in .gz."""
    content = (FIXTURES / name).read_bytes()
    return gzip.decompress(content) if name.endswith(".gz") else content


def profile(space: str, tags: dict[str, bytes], connection: str = "XYZ ", kind: str = "mntr") -> bytes:
    """An ICC profile, version 2."""
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name.encode() + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(
        ">I4sI4s4s4s", offset + len(data), bytes(4), 0x02400000, *(x.encode() for x in (kind, space, connection))
    )
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(x * 65536) for x in D50))
    return header + bytes(128 - len(header)) + struct.pack(">I", len(tags)) + table + data


def curve(levels: np.ndarray) -> bytes:
    """A channel's curve: linear light, 0 to 1, at evenly spaced values; a single value is a gamma."""
    values = (levels * 256).round() if len(levels) == 1 else (levels * 65535).round()
    return b"curv" + bytes(4) + struct.pack(">I", len(levels)) + values.astype(">u2").tobytes()


GAMMA = curve(np.array([2.2]))


def xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(x * 65536) for x in values))


def rgb_profile(primaries: tuple[tuple[float, ...], ...] = DISPLAY_P3, channel: bytes = GAMMA) -> bytes:
    tags = {f"{name}XYZ": xyz(values) for name, values in zip("rgb", primaries, strict=True)}
    return profile("RGB ", {"wtpt": xyz(D50), **tags, **{f"{name}TRC": channel for name in "rgb"}})


def grey_profile(gamma: float) -> bytes:
    return profile("GRAY", {"wtpt": xyz(D50), "kTRC": curve(np.array([gamma]))})


def cmyk_profile() -> bytes:
    """A profile whose inks are all grey: each takes away a quarter of the lightness."""
    grid = [
        (cyan, magenta, yellow, black) for cyan in (0, 1) for magenta in (0, 1) for yellow in (0, 1) for black in (0, 1)
    ]
    colours = bytes(value for inks in grid for value in (round(255 * (1 - sum(inks) / 4)), 128, 128))
    identity = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 if row == column else 0 for row in range(3) for column in range(3)))
    return profile("CMYK", {"wtpt": xyz(D50), "A2B0": table + identity * 4 + colours + identity * 3}, "Lab ", "prtr")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    size: tuple[int, int], depth: int, colour: int, rows: list[bytes], before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG file of these rows, packed as `depth` and `colour` say, with chunks before and after the pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", *size, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG file, up to the pixels."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 100) + b"IDAT"


def tiff(
    size: tuple[int, int], bits: int, photometric: int, pixels: bytes, more: dict[int, tuple[int, int]] | None = None
) -> bytes:
    """A grey TIFF file in one strip; `more` are tags of (type, value)."""
    tags = {256: (4, size[0]), 257: (4, size[1]), 258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 8)}
    tags |= {277: (3, 1), 278: (4, size[1]), 279: (4, len(pixels)), **(more or {})}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
    start = 8 + len(pixels) + len(pixels) % 2
    head = b"II*\0" + struct.pack("<I", start) + pixels + bytes(len(pixels) % 2)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


def packed_12_bits(values: np.ndarray) -> bytes:
    """Packs two values into three bytes; rows have an even length."""
    first, second = values.reshape(-1, 2).T.astype(int)
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
