"""Composes pictures of plans, from drawings and a background: a batch at a time, on any device."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.sizes import Size
from miniature.scenes import COLOURS, GRADIENT_WAYS, Plans

_LEVELS = (1.0, 0.75, 0.5, 0.375, 0.25)
"""Sizes, relative to the packed drawings, to which drawings are reduced before sampling, so that it skips no pixel."""


def background(plans: Plans, size: Size, device: torch.device | str = "cpu") -> Tensor:
    """The backgrounds of plans, float32 (n, 3, height, width) in 0..1: plain colours or gradients."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device) / 255
    start, end = palette[torch.as_tensor(plans.colours, device=device)].unbind(1)
    down, across = ((torch.arange(side, dtype=torch.float32, device=device) + 0.5) / side for side in size)
    ways = torch.as_tensor(plans.gradient_ways, device=device)[:, None, None]
    share = torch.where(ways == GRADIENT_WAYS.index("top to bottom"), down[:, None], across[None, :])[:, None]
    return torch.lerp(start[:, :, None, None], end[:, :, None, None], share)


def _levels(pixels: np.ndarray, side: int) -> np.ndarray:
    """For objects of ``pixels`` a side and drawings of ``side``: the smallest of `_LEVELS` with at least as many pixels, or 1."""
    levels = np.array(_LEVELS)
    enough = levels[:, None, None] * side >= np.asarray(pixels)[None]
    return np.where(enough, levels[:, None, None], np.inf).min(0, initial=1.0)


def _centres(plans: Plans, size: Size) -> np.ndarray:
    """The centres of the plans' objects in pixels, float32 (n, 2, 2), x and y, in pictures of ``size``.

    In a picture that is not square, a single object keeps its distance from the edge to which it was pushed, and two objects
    keep their distance from each other.
    """
    short = min(size)
    centres = np.empty_like(plans.centres)
    for axis, side in ((0, size[1]), (1, size[0])):
        offset = plans.centres[:, :, axis] - 0.5
        apart = np.where((plans.relations < 0)[:, None], np.sign(np.round(offset, 4)) * (side - short) / 2, 0)
        centres[:, :, axis] = side / 2 + offset * short + apart
    return centres


def _paste(pictures: Tensor, drawings: Tensor, centres: Tensor, sizes: Tensor) -> Tensor:
    """Pastes premultiplied float drawings (n, 4, s, s) at ``centres`` (n, 2), ``sizes`` (n,) large; both in pixels."""
    height, width = pictures.shape[-2:]
    x, y = (
        2 * (torch.arange(side, device=pictures.device) + 0.5 - centres[:, i, None]) / sizes[:, None]
        for i, side in enumerate((width, height))
    )
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    pasted = F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return pasted[:, :3] + pictures * (1 - pasted[:, 3:])


def compose(drawings: Tensor, plans: Plans, n_styles: int = 3, size: Size = (256, 256)) -> Tensor:
    """Composes the pictures of plans.

    Args:
        drawings: uint8 (objects * n_styles, 4, s, s), premultiplied RGBA as from `load_drawings`, on any device.
        plans: n plans. Their sizes are shares of the picture's shorter side.
        n_styles: number of styles of each object in ``drawings``.
        size: height and width of the pictures in pixels.

    Returns:
        float32 (n, 3, height, width) in 0..1, on the device of ``drawings``.
    """
    device = drawings.device
    pictures = background(plans, size, device)
    sides = plans.sizes * min(size)
    pixels = torch.as_tensor(sides, device=device)
    centres = torch.as_tensor(_centres(plans, size), device=device)
    index = torch.as_tensor(plans.objects * n_styles + plans.styles, device=device)
    levels = _levels(sides, drawings.shape[-1])
    for slot in range(2):
        for level in _LEVELS:
            rows = ((plans.objects[:, slot] >= 0) & (levels[:, slot] == level)).nonzero()[0]
            if not len(rows):
                continue
            at = torch.as_tensor(rows, device=device)
            chosen = drawings[index[at, slot]].float() / 255
            if level < 1:
                side = round(drawings.shape[-1] * level)
                chosen = F.interpolate(chosen, (side, side), mode="bilinear", antialias=True)
            pictures[at] = _paste(pictures[at], chosen, centres[at, slot], pixels[at, slot])
    return pictures.clamp_(0, 1)
