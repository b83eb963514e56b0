"""Reading pictures: every kind as a person sees it, and everything else in one sentence, before it is decoded."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.pictures import FORMATS, read_picture, to_rgb

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Wider than high; red on the left, blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.convert(mode)


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    return np.abs(np.subtract(image.getpixel(at), colour)).max() <= 6


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG file, up to where its pixels would come."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    pixels = struct.pack(">I", 100) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(tmp_path: Path, kind: str) -> None:
    halves().save(tmp_path / "picture", kind, quality=100)
    image = read_picture(tmp_path / "picture", "image")
    assert (image.mode, image.size) == ("RGB", (40, 20))
    assert near(image, (5, 10), RED)
    assert near(image, (35, 10), BLUE)


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("P", "PNG"), ("P", "GIF")])
def test_other_colour_modes(tmp_path: Path, mode: str, kind: str) -> None:
    halves(mode).save(tmp_path / "picture", kind)
    with Image.open(tmp_path / "picture") as stored:
        assert stored.mode == mode
    image = read_picture(tmp_path / "picture", "image")
    assert image.mode == "RGB"
    assert near(image, (5, 10), RED)
    assert near(image, (35, 10), BLUE)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_become_8(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(16, 0)
    Image.fromarray(ramp).save(tmp_path / "picture", kind)
    image = read_picture(tmp_path / "picture", "image")
    assert (np.asarray(image) == np.arange(256, dtype=np.uint8)[None, :, None]).all()


@pytest.mark.parametrize(("mode", "black", "clear"), [("L", 0, 255), ("1", 0, 1)])
def test_grey_and_bits(tmp_path: Path, mode: str, black: int, clear: int) -> None:
    image = Image.new(mode, (8, 4), clear)
    image.paste(black, (0, 0, 4, 4))
    image.save(tmp_path / "picture", "PNG")
    image = read_picture(tmp_path / "picture", "image")
    assert (image.getpixel((1, 1)), image.getpixel((6, 1))) == ((0, 0, 0), WHITE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 4))
    kind = "GIF" if mode == "P" else "TIFF" if mode == "PA" else "PNG"
    image.convert({"P": "RGBA", "PA": "RGBA"}.get(mode, mode)).save(tmp_path / "picture", kind)
    image = read_picture(tmp_path / "picture", "image")
    assert (image.getpixel((1, 1)), image.getpixel((6, 1))) == ((0, 0, 0), WHITE)
    assert read_picture(tmp_path / "picture", "mask", background="red").getpixel((6, 1)) == (255, 0, 0)
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert near(half, (0, 0), (127, 127, 127))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    """Stored so that the tag brings it back, as a camera does."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = halves()
    stored.paste((0, 255, 0), (0, 0, 10, 10))
    expected = np.asarray(stored)
    if orientation > 1:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "picture", "PNG", exif=exif)
    assert (np.asarray(read_picture(tmp_path / "picture", "image")) == expected).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (30, 30), colour) for colour in (RED, BLUE, WHITE)]
    frames[0].save(tmp_path / "picture", kind, save_all=True, append_images=frames[1:], duration=100)
    with Image.open(tmp_path / "picture") as stored:
        assert stored.n_frames == 3
    assert near(read_picture(tmp_path / "picture", "image"), (15, 15), RED)


@pytest.mark.parametrize("size", [(1, 1), (1, 32), (2048, 64), (3, 70)])
def test_small_and_long_ones(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, RED).save(tmp_path / "picture", "PNG")
    assert read_picture(tmp_path / "picture", "image").size == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image is no picture of one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF."),
        (b"not a picture", "image is no picture of one of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image is no picture of one of the"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is no picture of one of the formats"),
        (png_of(8000, 8001), "image is too large: it has 8000x8001 pixels, and 64,000,000 are the limit."),
        (png_of(20_000, 20_000), "image is too large: 64,000,000 pixels are the limit."),
        (png_of(2**31 - 1, 2**31 - 1), "image is too large: 64,000,000 pixels are the limit."),
        (png_of(33, 1), "image has 33x1 pixels; one side may be at most 32 times the other."),
        (png_of(64, 64), "image is a damaged PNG file."),
    ],
)
def test_what_is_refused_by_its_first_bytes(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "picture").write_bytes(content)
    with pytest.raises(ValueError, match=r"^image ") as caught:
        read_picture(tmp_path / "picture", "image")
    assert str(caught.value).startswith(message)


def test_nothing_too_large_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (8000, 8001)).save(tmp_path / "picture", "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="image is too large"):
        read_picture(tmp_path / "picture", "image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_half_a_file_is_damaged(tmp_path: Path, kind: str) -> None:
    noise = Image.effect_noise((200, 200), 60)
    noise.save(tmp_path / "picture", kind)
    content = (tmp_path / "picture").read_bytes()
    (tmp_path / "picture").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^image is (a damaged {kind} file|no picture of one of the formats .*)\.$"):
        read_picture(tmp_path / "picture", "image")


def test_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "picture", "TIFF")
    with pytest.raises(ValueError, match=r"^mask has 32 bits a channel; 8 or 16 are read\.$"):
        read_picture(tmp_path / "picture", "mask")


def scrambled(content: bytes, seed: int) -> bytes:
    changed, chance = bytearray(content), random.Random(seed)
    for _ in range(8):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(FORMATS), seed=st.integers(0, 2**32))
def test_a_damaged_file_is_a_picture_or_one_sentence(tmp_path: Path, kind: str, seed: int) -> None:
    halves().save(tmp_path / "picture", kind)
    (tmp_path / "picture").write_bytes(scrambled((tmp_path / "picture").read_bytes(), seed))
    try:
        assert read_picture(tmp_path / "picture", "image").mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("image ")  # noqa: PT017 - either is right
