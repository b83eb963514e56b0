"""Large pictures in bands: results are bit-identical to Pillow's for the whole picture."""

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cascade.images.bands import AVERAGED_TO, Upright
from cascade.images.colours import Conversion, to_rgb
from cascade.images.decoding import TURNS, Array

sides = st.integers(1, 70)


def noise(mode: str, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels.view(np.uint16)[..., 0])
    return Image.fromarray(pixels).convert(mode)


def whole_scaled(image: Image.Image, needed: tuple[int, int]) -> Image.Image:
    ratio = needed[0] / needed[1]
    left = (image.width - min(image.width, image.height * ratio)) / 2
    above = (image.height - min(image.height, image.width / ratio)) / 2
    box = (left, above, image.width - left, image.height - above)
    # Pillow 13 does so by itself; 12 premultiplies, too, but then does not average.
    colours = image.convert("RGBa") if image.mode == "RGBA" and image.size != needed else image
    return colours.resize(needed, Image.Resampling.LANCZOS, box, AVERAGED_TO).convert(image.mode)


@settings(deadline=None)
@given(
    mode=st.sampled_from(["L", "RGB", "RGBA", "CMYK"]),
    size=st.tuples(sides, sides),
    needed=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    turn=st.none() | st.sampled_from(list(TURNS.values())),
    band_pixels=st.integers(1, 2000),
)
def test_scaled_in_bands_as_whole(
    mode: str, size: tuple[int, int], needed: tuple[int, int], turn: Any, band_pixels: int
) -> None:
    image = noise(mode, *size)
    upright = image if turn is None else image.transpose(turn)
    with mock.patch("cascade.images.bands.BAND_PIXELS", band_pixels):
        scaled = Upright(image, turn).scaled(needed)
    expected = whole_scaled(upright, needed)
    assert scaled.mode == expected.mode == mode
    assert (np.asarray(scaled) == np.asarray(expected)).all()
    same_shape = ImageOps.fit(upright, needed, Image.Resampling.LANCZOS)
    assert scaled.size == same_shape.size


@pytest.mark.slow
@settings(deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    size=st.tuples(sides, sides),
    needed=st.none() | st.tuples(st.integers(1, 50), st.integers(1, 50)),
    turn=st.none() | st.sampled_from(list(TURNS.values())),
    background=st.sampled_from(["white", None]),
    band_pixels=st.integers(1, 2000),
)
def test_converted_in_bands_as_whole(
    mode: str, size: tuple[int, int], needed: Any, turn: Any, background: str | None, band_pixels: int
) -> None:
    image = noise(mode, *size)
    expected = to_rgb(image if turn is None else image.transpose(turn), background=background)
    with mock.patch("cascade.images.bands.BAND_PIXELS", band_pixels):
        picture, conversion = Upright(image, turn), Conversion.of(image, "image", background)
        if needed is None:
            converted = picture.joined(conversion.convert)
        else:
            converted, expected = picture.scaled(needed, conversion.convert), whole_scaled(expected, needed)
    assert converted.mode == expected.mode
    assert (np.asarray(converted) == np.asarray(expected)).all()


@settings(deadline=None)
@given(
    mode=st.sampled_from(["RGB", "RGBA"]),
    size=st.tuples(sides, sides),
    turn=st.none() | st.sampled_from(list(TURNS.values())),
    band_pixels=st.integers(1, 2000),
)
def test_what_opencv_decodes_as_what_pillow_does(mode: str, size: tuple[int, int], turn: Any, band_pixels: int) -> None:
    image = noise(mode, *size)
    pixels = np.asarray(image)[..., [2, 1, 0, 3][: len(mode)]]
    with mock.patch("cascade.images.bands.BAND_PIXELS", band_pixels):
        joined = Upright(Array(pixels, mode, {"RGB": "BGR", "RGBA": "BGRA"}[mode], {}), turn).joined()
    assert (np.asarray(joined) == np.asarray(image if turn is None else image.transpose(turn))).all()
