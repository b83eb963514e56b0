"""PNG files in strips: what decoders read of them, and what they weigh."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.images import png
from tests.readme import ROOT


def noise(width: int, height: int, levels: int = 256) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, levels, (height, width, 3), np.uint8) * (255 // (levels - 1)))


def chunks(file: Path) -> list[tuple[bytes, bytes]]:
    """A file's chunks; their checksums are compared."""
    content, found = file.read_bytes(), []
    assert content.startswith(png.SIGNATURE)
    place = len(png.SIGNATURE)
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", content, place + 8 + length)[0] == zlib.crc32(kind + data)
        found.append((kind, data))
        place += 12 + length
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), levels=st.sampled_from((2, 5, 256)), strip=st.integers(1, 3000)
)
def test_every_decoder_reads_the_same_pixels(tmp_path: Path, width: int, height: int, levels: int, strip: int) -> None:
    image, file = noise(width, height, levels), tmp_path / "noise.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png, "STRIP", strip)
        png.save_png(image, file, [])
    with Image.open(file) as read:
        assert (read.mode, read.size) == ("RGB", (width, height))
        assert read.tobytes() == image.tobytes()
    assert (cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[..., ::-1] == np.asarray(image)).all()


def test_the_file_is_as_the_standard_says(tmp_path: Path) -> None:
    file = tmp_path / "noise.png"
    png.save_png(noise(500, 700), file, [(b"tEXt", b"Title\0apple"), (b"tEXt", b"Author\0nobody")])
    found = chunks(file)
    kinds = [kind for kind, _ in found]
    count = kinds.count(b"IDAT")
    assert count > 2
    assert kinds == [b"IHDR", b"tEXt", b"tEXt", *[b"IDAT"] * count, b"IEND"]
    stream = b"".join(data for kind, data in found if kind == b"IDAT")
    assert len(zlib.decompress(stream)) == 700 * (1 + 3 * 500)  # also compares the stream's checksum
    with Image.open(file) as read:
        assert read.text == {"Title": "apple", "Author": "nobody"}


def test_threads_do_not_change_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(600, 800)
    png.save_png(image, tmp_path / "several.png", [])
    monkeypatch.setattr(png, "MOST_THREADS", 1)
    png.save_png(image, tmp_path / "one.png", [])
    assert (tmp_path / "several.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_files_are_hardly_larger_than_those_of_pillow(tmp_path: Path) -> None:
    whole = Image.open(ROOT / "docs" / "images" / "mini.webp").convert("RGB")
    kinds = [
        whole,
        whole.crop((0, 0, 256, 256)).resize((512, 512)),
        Image.new("RGB", (600, 600), "red"),
        noise(300, 300),
    ]
    for image in kinds:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_type=zlib.Z_RLE)
        png.save_png(image, tmp_path / "ours.png", [])
        assert (tmp_path / "ours.png").stat().st_size < 1.05 * buffer.tell() + 200
