"""Reading pictures: every kind as a viewer shows it, and errors of one sentence for everything else, before decoding."""

import ctypes
import gzip
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from cascade.images import decoding
from cascade.images.colours import to_rgb
from cascade.images.decoding import FORMATS, TURNS, PictureFile, upright
from cascade.images.reading import PACKAGE, PROGRAM, image_prompt_size, read_picture
from tests.images.files import FIXTURES, chunk, fixture, png, png_of, rgb_profile, tiff

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """A wide picture, red on the left and blue on the right."""
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    return image.convert(mode)


def near(image: Image.Image, at: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    return np.abs(np.subtract(image.getpixel(at), colour)).max() <= 6


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
    """Stored rotated, with a tag that undoes it, as a camera does."""
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
        (b"", "image is not a picture in one of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF."),
        (b"not a picture", "image is not a picture in one of the formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image is not a picture in one of the"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image is not a picture in one of the formats"),
        (png_of(8000, 8001), "image is too large: it has 8000x8001 pixels, and 64,000,000 are the limit."),
        (png_of(20_000, 20_000), "image is too large: 64,000,000 pixels are the limit."),
        (png_of(2**31 - 1, 2**31 - 1), "image is too large: 64,000,000 pixels are the limit."),
        (png_of(65, 1), "image has 65x1 pixels; one side may be at most 64 times the other."),
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
        PictureFile((tmp_path / "picture").open("rb"), "image")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_half_a_file_is_damaged(tmp_path: Path, kind: str) -> None:
    noise = Image.effect_noise((200, 200), 60)
    noise.save(tmp_path / "picture", kind)
    content = (tmp_path / "picture").read_bytes()
    (tmp_path / "picture").write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match=rf"^image is (a damaged {kind} file|not a picture in one of the formats .*)\.$"
    ):
        read_picture(tmp_path / "picture", "image")


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


@pytest.mark.parametrize("kind", ["t_100", "t_resunit_ascii", "t_xres_zero_neg"])
def test_odd_exif_still_says_which_side_is_up(kind: str) -> None:
    """Invalid EXIF tags are ignored. Only the orientation matters."""
    file = FIXTURES / f"exif_o6_{kind}.jpg"
    with Image.open(file) as stored:
        expected = stored.transpose(Image.Transpose.ROTATE_270)
        assert upright(stored).joined().tobytes() == expected.tobytes()
    assert read_picture(file, "image").tobytes() == expected.tobytes()


def test_broken_exif_is_ignored() -> None:
    with Image.open(FIXTURES / "png_exif_bad.png") as stored:
        assert read_picture(FIXTURES / "png_exif_bad.png", "image").tobytes() == stored.tobytes()


def test_odd_tags_in_tiff(tmp_path: Path) -> None:
    """Pillow rotates TIFF and reads all tags for it. The EXIF tags point beyond the file's end."""
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30
    (tmp_path / "picture").write_bytes(tiff((4, 2), 8, 1, pixels.tobytes(), {274: (3, 6), 34665: (4, 10**6)}))
    image = read_picture(tmp_path / "picture", "image")
    assert (np.asarray(image)[..., 0] == np.rot90(pixels, -1)).all()


def test_orientation_behind_the_pixels_of_png(tmp_path: Path) -> None:
    exif = b"II*\0" + (8).to_bytes(4, "little") + b"\1\0" + b"\x12\1\3\0\1\0\0\0\6\0\0\0" + bytes(4)
    (tmp_path / "picture").write_bytes(png((4, 2), 8, 0, [b"\0\0\xff\xff"] * 2, after=chunk(b"eXIf", exif)))
    sizes = []
    image = read_picture(tmp_path / "picture", "image", needed=lambda *size: sizes.append(size) or size)
    assert (image.size, sizes) == ((2, 4), [(2, 4)])
    assert (image.getpixel((0, 0)), image.getpixel((0, 3))) == ((0, 0, 0), WHITE)


def test_large_texts_and_profiles_in_png_do_not_matter(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"word " * 1_000_000))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000)))
    (tmp_path / "picture").write_bytes(png((4, 2), 8, 0, [b"\0\0\xff\xff"] * 2, text + profile))
    assert read_picture(tmp_path / "picture", "image").getpixel((3, 1)) == WHITE


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_is_scaled_to_the_bit_as_it_was_after_reading(tmp_path: Path, kind: str, mode: str) -> None:
    noise = Image.merge("RGB", [Image.effect_noise((150, 100), 100) for _ in range(3)]).convert(mode)
    noise.save(tmp_path / "picture", kind)
    whole = read_picture(tmp_path / "picture", "image")
    for size in ((32, 32), (64, 20), (150, 100), (250, 350), (51, 39), (300, 200)):
        part = read_picture(tmp_path / "picture", "image", needed=lambda *_, size=size: size)
        assert part.tobytes() == ImageOps.fit(whole, size, Image.Resampling.LANCZOS).tobytes()
        mask = read_picture(tmp_path / "picture", "mask", needed=lambda *_, size=size: size, mask=True)
        assert mask.tobytes() == whole.convert("L").resize(size, Image.Resampling.BOX).tobytes()


@pytest.mark.slow
def test_a_large_jpeg_is_shrunk_while_it_is_decoded(tmp_path: Path) -> None:
    """The result is nearly that of the whole picture."""
    shape = Image.radial_gradient("L").resize((3000, 2000))
    noise = Image.effect_noise((1500, 1000), 40).resize((3000, 2000))
    image = Image.merge("RGB", (shape, noise, shape.transpose(Image.Transpose.ROTATE_180)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "picture", "JPEG", quality=90, exif=exif)
    whole = read_picture(tmp_path / "picture", "image")
    assert whole.size == (2000, 3000)
    for size, near in (((1024, 1024), 0), ((400, 500), 1.5), ((64, 200), 1.5)):
        part = read_picture(tmp_path / "picture", "image", needed=lambda *_, size=size: size)
        expected = ImageOps.fit(whole, size, Image.Resampling.LANCZOS)
        assert np.abs(np.subtract(part, expected, dtype=float)).mean() <= near


def test_a_large_picture_that_is_shrunk_far_is_very_near_to_what_it_was(tmp_path: Path) -> None:
    noise = Image.effect_noise((750, 700), 40).resize((2250, 2100))
    noise.save(tmp_path / "picture", "BMP")
    for size in ((2250, 2100), (2249, 2099), (75, 70), (1, 2100)):
        assert read_picture(tmp_path / "picture", "image", needed=lambda *_, size=size: size).size == size
    part = read_picture(tmp_path / "picture", "image", needed=lambda *_: (200, 300))
    whole = ImageOps.fit(noise, (200, 300), Image.Resampling.LANCZOS)
    assert 0 < np.abs(np.subtract(part.convert("L"), whole, dtype=float)).mean() < 1


def test_a_large_image_prompt_is_read_in_the_size_that_clip_needs(tmp_path: Path) -> None:
    """CLIP's input is nearly that from the whole picture."""
    assert image_prompt_size(2048, 2048) == (2048, 2048)
    assert image_prompt_size(8000, 600) == (1200, 600)
    assert image_prompt_size(3000, 4000) == (896, 1195)
    noise = Image.merge("RGB", [Image.effect_noise((126, 80), 40).resize((3150, 2000)) for _ in range(3)])
    noise.save(tmp_path / "picture", "BMP")
    part = read_picture(tmp_path / "picture", "image", needed=image_prompt_size)
    theirs, ours = (CLIPImageProcessorPil(do_normalize=False)(image)["pixel_values"][0] for image in (noise, part))
    assert np.abs(theirs - ours).mean() < 0.004  # 1 of 255


def test_what_the_size_is_for_may_refuse_it(tmp_path: Path) -> None:
    halves().save(tmp_path / "picture", "PNG")

    def refuse(width: int, height: int) -> tuple[int, int]:
        raise KeyError((width, height))

    with pytest.raises(KeyError, match=r"\(40, 20\)"):
        read_picture(tmp_path / "picture", "image", needed=refuse)
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)


# ---- the bounds ----


PEAK = """
import resource, sys
from pathlib import Path
from cascade.images.reading import read_picture
image = read_picture(Path(sys.argv[1]), "image", needed=lambda *_: (64, 64))
assert (image.mode, image.size) == ("RGB", (64, 64))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


FRAGMENTED = """
import sys
from pathlib import Path
import psutil
from cascade.images.reading import read_picture

# Freed, but between blocks that are still in use.
blocks = [(bytearray(100_000), bytearray(1_000)) for _ in range(1_000)]
kept = [small for _, small in blocks]
del blocks
memory = [psutil.Process().memory_info().rss]
for path in sys.argv[1:]:
    read_picture(Path(path), "image", needed=lambda *_: (64, 64))
    memory.append(psutil.Process().memory_info().rss)
print(*memory)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="there is no glibc")
def test_freed_memory_is_given_back_before_a_large_picture_is_decoded(tmp_path: Path) -> None:
    small, large = tmp_path / "small", FIXTURES / "64-megapixels.webp"
    Image.new("RGB", (640, 480)).save(small, "PNG")
    command = [sys.executable, "-c", FRAGMENTED, small, large]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    before, after_small, after_large = map(int, done.stdout.split())
    assert after_small > before - 10e6
    assert after_large < before - 80e6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["64-megapixels.webp", "64-megapixels-alpha.webp.gz", "64-megapixels.avif.gz"])
def test_64_megapixels_take_600_megabytes(tmp_path: Path, name: str) -> None:
    """Of these, a decoder alone has 200 to 512. With 900 of a worker, it stays below 1.5 GB: tests/http/test_strangers.py."""
    (tmp_path / "picture").write_bytes(fixture(name))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "picture"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * (1 if sys.platform == "darwin" else 1024) < 600e6


DECODE = """
import sys
from cascade.images.decoding import PictureFile
with open(sys.argv[1], "rb") as file:
    image = PictureFile(file, "image").decode(needed=(64, 48))
assert (image.mode, image.size) == ("RGB", (64, 48))
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory was used")
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("WEBP", "RGB")])
def test_a_large_picture_is_in_memory_once(tmp_path: Path, kind: str, mode: str) -> None:
    """Of 4 bytes a pixel, with 35 MB of Python and Pillow, 50 of OpenCV, which decodes WebP, and a few bands."""
    Image.new(mode, (6000, 5000), "tan").save(tmp_path / "picture", kind)
    done = subprocess.run(
        [sys.executable, "-c", DECODE, tmp_path / "picture"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.25 * 4 * 6000 * 5000 + 85e6


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_avif_file_has_pillows_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((60, 40), 60).convert(mode).save(tmp_path / "picture", "AVIF", exif=exif)
    decoded = []
    for most in (2**24, 0):
        monkeypatch.setattr(decoding, "LARGE_PIXELS", most)
        with (tmp_path / "picture").open("rb") as file:
            decoded.append(PictureFile(file, "image").decode(background=None))
    assert decoded[0].mode == decoded[1].mode
    assert decoded[0].tobytes() == decoded[1].tobytes()
    assert decoded[1].size == ((40, 60) if orientation == 6 else (60, 40))


@pytest.mark.slow
def test_webp_whose_headers_disagree_about_transparency(tmp_path: Path) -> None:
    """A large file: Pillow finds the mode, and OpenCV decodes it."""
    Image.new("RGBA", (4100, 4100), (255, 0, 0, 128)).save(tmp_path / "simple", "WEBP", lossless=True, method=0)
    stored = (tmp_path / "simple").read_bytes()
    still = stored[stored.index(b"VP8L") :]
    side = (4099).to_bytes(3, "little")
    for flags, colour in ((0, RED), (0x10, (255, 0, 0, 128))):
        content = b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes([flags, 0, 0, 0]) + side * 2 + still
        (tmp_path / "picture").write_bytes(b"RIFF" + len(content).to_bytes(4, "little") + content)
        read = read_picture(tmp_path / "picture", "image", background=None, needed=lambda *_: (50, 50))
        assert read.getpixel((25, 25)) == colour


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A picture of 16 pixels with a tile of a gigabyte."""
    tags = {322: (4, 32768), 323: (4, 32768), 324: (4, 8), 325: (4, 16)}
    (tmp_path / "picture").write_bytes(tiff((4, 4), 8, 1, bytes(16), {259: (3, 8), **tags}))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(ValueError, match=r"^image (needs more memory than|is a damaged TIFF file)"):
        read_picture(tmp_path / "picture", "image")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 500_000)
    halves().save(tmp_path / "picture", "PNG")
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)


def test_want_of_memory_has_its_own_sentence(tmp_path: Path) -> None:
    """An animation of 64 megapixels in 154 bytes. One frame takes six times four bytes per pixel."""
    still = (FIXTURES / "64-megapixels.webp").read_bytes()[12:]
    side = (7999).to_bytes(3, "little")
    frame = bytes(6) + side * 2 + bytes(4) + still
    chunks = [(b"VP8X", b"\2\0\0\0" + side * 2), (b"ANIM", bytes(6)), (b"ANMF", frame), (b"ANMF", frame)]
    content = b"WEBP" + b"".join(name + len(data).to_bytes(4, "little") + data for name, data in chunks)
    (tmp_path / "picture").write_bytes(b"RIFF" + len(content).to_bytes(4, "little") + content)
    with pytest.raises(
        ValueError, match=r"^image (is a damaged WEBP file, or )?needs more memory than 576 MB to be decoded\.$"
    ):
        read_picture(tmp_path / "picture", "image")


def decoder_of_this_process() -> psutil.Process:
    (process,) = (child for child in psutil.Process().children() if "cascade.images.child" in " ".join(child.cmdline()))
    return process


def test_a_decoder_that_is_killed_is_replaced(tmp_path: Path) -> None:
    halves().save(tmp_path / "picture", "PNG")

    def kill(width: int, height: int) -> tuple[int, int]:
        decoder_of_this_process().kill()
        return width, height

    with pytest.raises(ValueError, match=r"^image needs more memory to be decoded than is free\.$"):
        read_picture(tmp_path / "picture", "image", needed=kill)
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)
    decoder = decoder_of_this_process()
    decoder.kill()
    while decoder.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)


def scans(count: int) -> bytes:
    """A JPEG file of 63 megapixels with `count` progressive scans. Each takes 0.15 s of CPU time."""
    whole = gzip.decompress((FIXTURES / "many-scans.jpg.gz").read_bytes())
    return b"\xff\xda".join(whole.split(b"\xff\xda")[: count + 1])


def test_many_scans_are_refused(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(scans(101))
    with pytest.raises(ValueError, match=r"^image has 101 scans; 100 are the limit\.$"):
        read_picture(tmp_path / "picture", "image")


@pytest.mark.parametrize(("cpu", "clock", "expected"), [(0.2, 9, signal.SIGPROF), (9, 0.2, signal.SIGALRM)])
def test_time_is_bounded(tmp_path: Path, cpu: float, clock: float, expected: int) -> None:
    """A process that is busy in C code is killed after its time, and each way in which the decoder may end has its error."""
    busy = f"from cascade.images.child import limit_time; limit_time({cpu}, {clock}); pow(3, 10**9)"
    assert subprocess.run([sys.executable, "-c", busy], check=False, cwd=PACKAGE.parent).returncode == -expected
    halves().save(tmp_path / "picture", "PNG")

    def end(width: int, height: int) -> tuple[int, int]:
        decoder_of_this_process().send_signal(expected)
        return width, height

    limit = "8 s of a processor" if expected == signal.SIGPROF else "40 s"
    with pytest.raises(ValueError, match=rf"^image takes more than {limit} to decode, which is the limit\.$"):
        read_picture(tmp_path / "picture", "image", needed=end)


def test_a_cancellation_is_heard_while_a_picture_is_decoded(tmp_path: Path) -> None:
    """Raises an exception in the thread, as Cog does."""
    (tmp_path / "picture").write_bytes(scans(100))
    times = []

    def read() -> None:
        try:
            read_picture(tmp_path / "picture", "image")
        except KeyboardInterrupt:
            times.append(time.monotonic())

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.5)
    asked = time.monotonic()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    thread.join()
    assert times[0] - asked < 1
    halves().save(tmp_path / "picture", "PNG")
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)


def test_threads_get_their_own_pictures(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (30 + i, 20), (i, i, i)).save(tmp_path / str(i), "PNG")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: read_picture(tmp_path / str(i), "image"), range(20)))
    assert [(image.size, image.getpixel((0, 0))) for image in images] == [((30 + i, 20), (i, i, i)) for i in range(20)]


def test_a_forked_process_has_a_decoder_of_its_own(tmp_path: Path) -> None:
    halves().save(tmp_path / "picture", "PNG")
    read_picture(tmp_path / "picture", "image")
    mine = decoder_of_this_process().pid
    child = os.fork()
    if child == 0:
        read_picture(tmp_path / "picture", "image")
        os._exit(decoder_of_this_process().pid == mine)
    assert os.waitpid(child, 0)[1] == 0
    assert read_picture(tmp_path / "picture", "image").size == (40, 20)


def test_the_decoder_imports_no_torch() -> None:
    """This is why it starts in 0.1 s."""
    program = PROGRAM.replace("main()", "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    subprocess.run([sys.executable, "-P", "-c", program, str(PACKAGE)], check=True)


# ---- any picture ----

MODES = {
    "JPEG": ["L", "RGB", "CMYK"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "P", "RGB"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"],
    "AVIF": ["L", "RGB", "RGBA"],
}
STORED = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
UNTURN = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}


@pytest.mark.slow
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stored=st.sampled_from(STORED),
    size=st.tuples(st.integers(17, 90), st.integers(17, 90)),
    orientation=st.integers(0, 9),
    profile=st.booleans(),
    needed=st.none() | st.just("its own") | st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_any_picture_is_upright_in_8_bits(
    tmp_path: Path, stored: tuple[str, str], size: tuple[int, int], orientation: int, profile: bool, needed: Any
) -> None:
    """Upright pictures are light in the upper left corner, and dark elsewhere."""
    kind, mode = stored
    grey = Image.new("L", size, 20)
    grey.paste(240, (0, 0, size[0] // 2, size[1] // 2))
    if orientation in UNTURN:
        grey = grey.transpose(TURNS[UNTURN[orientation]])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode in ("1", "P", "CMYK", "L"):
        image = grey.convert("RGB").convert(mode, dither=Image.Dither.NONE)
    else:
        image = grey.convert(mode)
    options: dict[str, Any] = (
        {"icc_profile": rgb_profile()} if profile and kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    )
    turned = kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
    if turned:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    image.save(tmp_path / "picture", kind, **options)
    wanted = {None: None, "its own": lambda *own: own}.get(needed, lambda *_: needed)
    read = read_picture(tmp_path / "picture", "image", needed=wanted)
    needed = None if needed == "its own" else needed
    expected = size if turned or orientation not in UNTURN else grey.size
    assert (read.mode, read.size) == ("RGB", expected if needed is None else needed)
    if needed is None and (turned or orientation not in UNTURN):
        width, height = size
        assert min(read.getpixel((width // 5, height // 5))) > 180
        assert max(read.getpixel((width * 4 // 5, height * 4 // 5))) < 80
        assert max(read.getpixel((width // 5, height * 4 // 5))) < 80


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=st.sampled_from(STORED), share=st.floats(0, 1), needed=st.none() | st.just((9, 9)))
def test_the_beginning_of_a_file_is_a_picture_or_one_sentence(
    tmp_path: Path, stored: tuple[str, str], share: float, needed: Any
) -> None:
    kind, mode = stored
    image = Image.effect_noise((50, 40), 60)
    image = Image.fromarray(np.asarray(image).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "picture", kind, **({"icc_profile": rgb_profile()} if kind == "PNG" else {}))
    content = (tmp_path / "picture").read_bytes()
    (tmp_path / "picture").write_bytes(content[: int(share * len(content))])
    try:
        read = read_picture(tmp_path / "picture", "image", needed=None if needed is None else lambda *_: needed)
        assert (read.mode, read.size) == ("RGB", needed or (50, 40))
    except ValueError as error:
        assert re.fullmatch(r"image [^\n]+\.", str(error))  # noqa: PT017 - either is right


def test_a_path_is_of_the_present_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths follow the current directory, wherever the decoder was started."""
    Image.new("RGB", (5, 4), "red").save(tmp_path / "one.png")
    read_picture(tmp_path / "one.png", "image")
    monkeypatch.chdir(tmp_path)
    assert read_picture(Path("one.png"), "image").size == (5, 4)
