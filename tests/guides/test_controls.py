"""Controls from pictures: edges, the authors' sizes, masks and latents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade.guides import controls

sides = st.integers(1, 300)


def step(height: float, left: int = 0, channels: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """48 x 64 pixels of value `left`. In the right half, some channels are higher by `height`. Both in 255ths."""
    pixels = torch.full((1, 3, 48, 64), float(left))
    for channel in channels:
        pixels[:, channel, :, 32:] += height
    return pixels / 255


@pytest.mark.parametrize("channels", [(0, 1, 2), (0,), (2,)])
def test_edges_are_where_a_channel_changes_enough(channels):
    """Sobel's kernel returns 4 times a step's height. More than 200 in any channel is an edge."""
    edges = controls.canny(step(51, 90, channels), side=None)
    assert edges.shape == (1, 1, 48, 64)
    assert edges[0, 0].any(dim=0).nonzero().flatten().tolist() in ([31], [32])
    assert edges.max() == 1
    assert edges[0, 0].sum() == 48
    below = step(50, 90, channels)
    assert not controls.canny(below, side=None).any()
    below[:, :, 20, 30] = 89 / 255  # Sobel's kernel returns 202 here, the lowest value above 200, as its sums are even
    assert controls.canny(below, side=None).any()


@pytest.mark.parametrize(("height", "rows"), [(26, 48), (25, 24)])
def test_faint_edges_count_where_they_continue_strong_ones(height, rows):
    """Next to an edge, more than 100 is enough."""
    pixels = step(height)
    pixels[:, :, :24] = step(120)[:, :, :24]
    found = controls.canny(pixels, side=None)[0, 0].any(dim=1).sum().item()
    assert abs(found - rows) <= 2


@given(left=st.integers(0, 204))
@settings(deadline=None)
def test_pixels_are_cut_off_to_whole_levels(left):
    """As in the authors' code. The 256 levels of an 8-bit picture are kept exactly."""
    assert controls.canny(step(51, left), side=None).any()
    assert not controls.canny(step(50.9, left), side=None).any()


def test_edges_are_found_at_224_pixels():
    """Lines are about 1/224 of the picture thick. Both resizings are bilinear without antialiasing."""
    torch.manual_seed(0)
    pixels = F.interpolate(torch.rand(2, 3, 6, 5), size=(672, 448))
    small = F.interpolate(pixels, size=(224, 224), mode="bilinear", align_corners=False)
    expected = F.interpolate(controls.canny(small, side=None), size=(672, 448), mode="bilinear", align_corners=False)
    edges = controls.canny(pixels)
    torch.testing.assert_close(edges, expected)
    assert 0.01 < edges.mean() < 0.2
    # A line of one pixel in 224 is two pixels wide and three high here, and fades over about as many on both sides.
    assert edges.mean() > 1.5 * controls.canny(pixels, side=None).mean()


@given(
    height=sides, width=sides, side=st.sampled_from([None, 224]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=40, deadline=None)
def test_edges_of_any_picture(height, width, side, dtype):
    torch.manual_seed(height * 300 + width)
    pixels = torch.rand(2, 3, height, width).to(dtype)
    edges = controls.canny(pixels, side)
    assert edges.shape == (2, 1, height, width)
    assert edges.dtype == torch.float32
    assert edges.min() >= 0
    assert edges.max() <= 1
    assert torch.equal(edges[1:], controls.canny(pixels[1:], side))
    assert not controls.canny(torch.full((1, 3, height, width), 0.7), side).any()
    if side is None:
        assert set(np.unique(edges)) <= {0, 1}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 4, 32, 32)])
def test_edges_of_something_else(shape):
    with pytest.raises(ValueError, match=r"pixels has the shape \(.*\); canny takes \(batch, 3, height, width\)"):
        controls.canny(torch.zeros(shape))


@given(batch=st.integers(1, 3), height=sides, width=sides)
@settings(max_examples=30, deadline=None)
def test_inpainting(batch, height, width):
    torch.manual_seed(height * 300 + width)
    pixels, mask = torch.rand(batch, 3, height, width), torch.rand(batch, 1, height, width) > 0.5
    before = pixels.clone()
    control = controls.inpainting(pixels, mask)
    assert control.shape == (batch, 4, height, width)
    assert torch.equal(control[:, 3:] == 1, mask)
    assert torch.equal(control[:, 3:] == 0, ~mask)
    hidden = mask.expand(-1, 3, -1, -1)
    assert (control[:, :3][hidden] == 1).all()
    assert torch.equal(control[:, :3][~hidden], pixels[~hidden])
    assert torch.equal(pixels, before)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(2, 1, 8, 9),
        torch.zeros(1, 1, 8, 9).bool(),
        torch.zeros(2, 8, 9).bool(),
        torch.zeros(2, 1, 9, 8).bool(),
    ],
    ids=["float", "batch", "dimensions", "size"],
)
def test_masks_that_do_not_fit(mask):
    with pytest.raises(ValueError, match=r"mask is torch\.\w+ of the shape .*it must be torch\.bool of \(2, 1, 8, 9\)"):
        controls.inpainting(torch.zeros(2, 3, 8, 9), mask)


def test_super_resolution() -> None:
    """Every latent is repeated 2 x 2 times."""
    latents = torch.rand(2, 6, 2, 3)
    control = controls.super_resolution(latents)
    assert control.shape == (2, 6, 4, 6)
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(control[:, :, row::2, column::2], latents)
