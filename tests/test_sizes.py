"""Latent sizes and crops for all allowed sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade import sizes
from cascade.compat.diffusers import decoder_size
from cascade.limits import RATIOS

sides = st.integers(sizes.SMALLEST, sizes.LARGEST)


@given(height=sides, width=sides)
def test_native_size_is_the_next_multiple_of_eight(height: int, width: int) -> None:
    for side, native in zip((height, width), sizes.native_size(height, width), strict=True):
        assert native % 8 == 0
        assert 0 <= native - side < 8


@given(height=sides, width=sides)
def test_latents_fit_every_size(height: int, width: int) -> None:
    native = sizes.native_size(height, width)
    for side, semantic, decoder in zip(native, sizes.semantic_size(*native), sizes.decoder_size(*native), strict=True):
        assert decoder * 4 == side
        assert decoder % 2 == 0
        assert semantic * 42.67 >= side > (semantic - 1) * 42.67
    assert sizes.encoder_size(*native) == tuple(32 * side for side in sizes.semantic_size(*native))


@given(height=st.integers(1, 20_000), width=st.integers(1, 20_000), native=st.sampled_from([256, 1024, 1536]))
def test_fitted_sizes_have_the_shape_and_the_native_area(height: int, width: int, native: int) -> None:
    rows, columns = sizes.fitted_size(height, width, native)
    assert sizes.native_size(rows, columns) == (rows, columns)
    if min(rows, columns) > sizes.SMALLEST and max(rows, columns) < sizes.WHOLE:
        assert abs(math.log(rows / columns) - math.log(height / width)) < 5 / rows + 5 / columns
        assert abs(math.log(rows * columns / native**2)) < 5 / rows + 5 / columns


@pytest.mark.parametrize(
    ("image", "asked", "expected"),
    [
        ((3000, 4000), (None, None), (888, 1184)),
        ((768, 768), (None, None), (1024, 1024)),
        ((1, 1), (None, None), (1024, 1024)),
        ((2000, 1000), (None, 100), (200, 100)),
        ((2000, 1000), (100, None), (100, 64)),
        ((1000, 3000), (2048, None), (2048, 4096)),
        ((3000, 1000), (None, 1024), (3072, 1024)),
        ((3000, 4000), (77, 99), (77, 99)),
        ((100, 3200), (None, None), (64, 2048)),
    ],
)
def test_fitted_size(image: tuple[int, int], asked: tuple[int | None, int | None], expected: tuple[int, int]) -> None:
    assert sizes.fitted_size(*image, 1024, *asked) == expected


@pytest.mark.parametrize(
    ("pixels", "semantic", "decoder"),
    [(1024, 24, 256), (768, 18, 192), (1536, 36, 384), (2048, 48, 512), (1280, 30, 320), (832, 20, 208), (256, 6, 64)],
)
def test_known_sizes(pixels: int, semantic: int, decoder: int) -> None:
    assert sizes.semantic_size(pixels, pixels) == (semantic, semantic)
    assert sizes.decoder_size(pixels, pixels) == (decoder, decoder)


@given(height=sides, width=sides)
def test_crop_is_central_and_undoes_the_padding(height: int, width: int) -> None:
    native = sizes.native_size(height, width)
    rows = torch.arange(height, dtype=torch.float32).view(1, 1, -1, 1)
    columns = torch.arange(width, dtype=torch.float32).view(1, 1, 1, -1)
    for pixels in (rows, columns):
        shape = (native[0] if pixels is rows else 1, native[1] if pixels is columns else 1)
        padded = sizes.pad(pixels, *shape)
        assert padded.shape[-2:] == shape
        assert torch.equal(sizes.crop(padded, *pixels.shape[-2:]), pixels)
    places = torch.arange(native[0]).view(-1, 1)
    kept = sizes.crop(places, height, 1).flatten()
    assert kept[0] == (native[0] - height) // 2
    assert native[0] - 1 - kept[-1] == math.ceil((native[0] - height) / 2)


@pytest.mark.parametrize(("height", "width", "name"), [(63, 64, "height"), (64, 4097, "width"), (0, 64, "height")])
def test_sizes_out_of_range_are_refused(height: int, width: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* from 64 to 4096"):
        sizes.native_size(height, width)


def test_decoder_size_wants_multiples_of_eight() -> None:
    with pytest.raises(ValueError, match="100x64; both sides must be multiples of 8"):
        sizes.decoder_size(100, 64)


def test_diffusers_size() -> None:
    assert decoder_size((24, 18)) == (256, 192)
    with pytest.raises(ValueError, match="26x24 semantic latents make 277x256"):
        decoder_size((26, 24))


@pytest.mark.parametrize("native", [256, 1024, 1536])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratios_are_exact(ratio: str, native: int) -> None:
    height, width = sizes.ratio_size(ratio, native)
    columns, rows = map(int, ratio.split(":"))
    assert width * rows == height * columns
    assert width % 8 == height % 8 == 0
    assert max(width, height) <= 2048
    if native == 1024:
        assert 0.92 < width * height / native**2 < 1.09
    if ratio == "1:1":
        assert (width, height) == (native, native)
