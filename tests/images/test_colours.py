"""Colours: profiles applied, 16 bits and transparency as a viewer shows them."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from cascade.images.colours import to_rgb
from cascade.images.reading import read_picture
from tests.images.files import (
    DISPLAY_P3,
    FIXTURES,
    SRGB,
    chunk,
    cmyk_profile,
    curve,
    grey_profile,
    packed_12_bits,
    png,
    profile,
    rgb_profile,
    tiff,
)

WHITE = (255, 255, 255)


def colours(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(-1, 3).astype(int)


def srgb_of(p3: np.ndarray) -> np.ndarray:
    """Convert to sRGB by the standard formulas: linear light, XYZ, the inverse of sRGB's matrix at D50, sRGB's curve."""
    linear = np.linalg.inv(np.array(SRGB).T) @ np.array(DISPLAY_P3).T @ (p3.T / 255) ** 2.2
    linear = linear.clip(0, 1)
    return (np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255).T


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_display_p3_becomes_srgb(tmp_path: Path, kind: str) -> None:
    """The profile of a phone's pictures."""
    patches = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128), (250, 200, 60)], np.uint8)
    image = Image.fromarray(patches.repeat(32, 0)[None].repeat(16, 0))
    image.save(tmp_path / "picture", kind, quality=100, icc_profile=rgb_profile(), subsampling="4:4:4")
    read = np.asarray(read_picture(tmp_path / "picture", "image"))[8, 16::32].astype(int)
    assert np.abs(read - srgb_of(patches.astype(float))).max() <= 4
    assert np.abs(read - patches).max() >= 15


def test_adobe_rgb_becomes_srgb() -> None:
    for name in ("icc_adobe.png", "icc-adobe.jpg"):
        image = read_picture(FIXTURES / name, "image")
        assert np.abs(np.subtract(image.getpixel((5, 5)), (200, 30, 30))).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profiles_of_grey_pictures(tmp_path: Path, mode: str) -> None:
    ramp = Image.linear_gradient("L")
    image = Image.fromarray(np.asarray(ramp).astype(np.uint16) * 257) if mode == "I;16" else ramp.convert(mode)
    image.save(tmp_path / "picture", "PNG", icc_profile=grey_profile(1.0))
    (read,) = {tuple(row) for row in np.asarray(read_picture(tmp_path / "picture", "image"))[64]}
    linear = np.asarray(ramp)[64, 0] / 255
    expected = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert np.abs(np.array(read) - expected).max() <= 2


def test_profiles_of_transparent_pictures_leave_the_transparency(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 4), (200, 30, 30, 255))
    image.paste((200, 30, 30, 0), (0, 0, 4, 4))
    image.save(tmp_path / "picture", "PNG", icc_profile=rgb_profile())
    read = read_picture(tmp_path / "picture", "image")
    assert read.getpixel((1, 1)) == WHITE
    assert np.abs(read.getpixel((6, 1)) - srgb_of(np.array([[200.0, 30, 30]]))).max() <= 2
    kept = read_picture(tmp_path / "picture", "image", background=None)
    assert kept.mode == "RGBA"
    assert (kept.getpixel((1, 1))[3], kept.getpixel((6, 1))) == (0, (*read.getpixel((6, 1)), 255))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_profiles_of_cmyk_pictures(tmp_path: Path, kind: str) -> None:
    """In this profile, all inks are grey."""
    Image.new("CMYK", (32, 32), (255, 0, 255, 0)).save(tmp_path / "picture", kind, icc_profile=cmyk_profile())
    red, green, blue = read_picture(tmp_path / "picture", "image").getpixel((16, 16))
    assert max(red, green, blue) - min(red, green, blue) <= 6
    assert 100 < green < 140


def test_srgb_changes_nothing_whatever_it_is_called(tmp_path: Path) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 100) for _ in range(3)])
    levels = np.arange(1024) / 1023
    light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    pillows = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for content in (pillows, rgb_profile(SRGB, curve(light))):
        noise.save(tmp_path / "picture", "PNG", icc_profile=content)
        assert read_picture(tmp_path / "picture", "image").tobytes() == noise.tobytes()


@pytest.mark.parametrize(
    "content",
    [
        b"no profile",
        rgb_profile()[:200],
        rgb_profile().replace(b"acsp", b"none"),
        grey_profile(1.0),
        cmyk_profile(),
        profile("RGB ", {}),
    ],
    ids=["text", "cut", "unmarked", "grey", "cmyk", "empty"],
)
def test_what_is_no_profile_of_the_picture_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 30))
    image.save(tmp_path / "picture", "PNG", icc_profile=content)
    with caplog.at_level(logging.WARNING, "cascade"):
        assert read_picture(tmp_path / "picture", "image_prompts[1]").tobytes() == image.tobytes()
    (record,) = caplog.records
    assert record.getMessage().startswith("The colour profile of image_prompts[1] is ignored: ")
    assert len(record.getMessage()) < 200


def test_profiles_of_pictures_from_python() -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 30))
    image.info["icc_profile"] = rgb_profile()
    converted = to_rgb(image)
    assert np.abs(colours(converted)[0] - srgb_of(np.array([[200.0, 30, 30]]))).max() <= 2
    assert to_rgb(converted) is converted


def test_a_transparent_grey_of_16_bits_is_transparent() -> None:
    deep, plain = (np.asarray(read_picture(FIXTURES / f"grey{bits}_trns.png", "image")) for bits in (16, 8))
    assert (deep == plain).all()
    assert (plain == 255).all(2).any()
    deep, plain = (
        np.asarray(read_picture(FIXTURES / f"mask{bits}_white_transparent.png", "mask", mask=True)) for bits in (16, 8)
    )
    assert (deep == plain).all()
    assert not plain.all()


@pytest.mark.parametrize(
    ("depth", "row", "clear"), [(1, b"\xf0", 1), (2, b"\xff\x00", 3), (4, b"\xff\xff\x00\x00", 15)]
)
def test_a_transparent_grey_of_few_bits_is_transparent(tmp_path: Path, depth: int, row: bytes, clear: int) -> None:
    mark = chunk(b"tRNS", clear.to_bytes(2, "big"))
    (tmp_path / "picture").write_bytes(png((8, 4), depth, 0, [row] * 4, mark))
    image = read_picture(tmp_path / "picture", "image", background="red")
    assert (image.getpixel((1, 1)), image.getpixel((6, 1))) == ((255, 0, 0), (0, 0, 0))


def test_a_transparent_colour_of_16_bits_is_transparent(tmp_path: Path) -> None:
    clear, other = b"\x12\x34\xab\xcd\x00\xff", b"\x00\x00\xff\xff\x00\x00"
    (tmp_path / "picture").write_bytes(png((8, 4), 16, 2, [clear * 4 + other * 4] * 4, chunk(b"tRNS", clear)))
    image = read_picture(tmp_path / "picture", "image")
    assert (image.getpixel((1, 1)), image.getpixel((6, 1))) == (WHITE, (0, 255, 0))


@pytest.mark.parametrize(("bits", "photometric"), [(16, 1), (16, 0), (12, 1)])
def test_deep_tiff(tmp_path: Path, bits: int, photometric: int) -> None:
    """White is the largest value, or as from scanners, zero."""
    white = 2**bits - 1
    ramp = np.linspace(0, white, 256).round().astype(np.uint16)
    values = np.stack([ramp if photometric else white - ramp] * 16)
    pixels = packed_12_bits(values) if bits == 12 else values.astype("<u2").tobytes()
    (tmp_path / "picture").write_bytes(tiff((256, 16), bits, photometric, pixels))
    image = np.asarray(read_picture(tmp_path / "picture", "image"))
    assert (image == np.arange(256)[None, :, None]).all()
    mask = np.asarray(read_picture(tmp_path / "picture", "mask", mask=True))
    assert (mask == np.arange(256)).all()


def test_compressed_deep_tiff_with_white_as_zero(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(16, 0)
    Image.fromarray(ramp).save(tmp_path / "picture", "TIFF", compression="tiff_lzw", tiffinfo={262: 0})
    with Image.open(tmp_path / "picture") as stored:
        inverted = stored.tag_v2[262] == 0
    image = np.asarray(read_picture(tmp_path / "picture", "image"))[0, :, 0].astype(int)
    assert (image == (255 - np.arange(256) if inverted else np.arange(256))).all()


def test_lab(tmp_path: Path) -> None:
    lab = ImageCms.createProfile("LAB")
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    stored = ImageCms.profileToProfile(red, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")
    stored.save(tmp_path / "picture", "TIFF")
    read = read_picture(tmp_path / "picture", "image").getpixel((3, 3))
    assert np.abs(np.subtract(read, (200, 30, 30))).max() <= 4


def test_32_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "picture", "TIFF")
    with pytest.raises(ValueError, match=r"^mask has 32 bits per channel; 8 or 16 are read\.$"):
        read_picture(tmp_path / "picture", "mask", mask=True)
