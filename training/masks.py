"""Random masks for inpainting: boxes, blobs and strokes, as people draw them, and their inverses, as outpainting has them."""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 0.2, 0.9
"""Range of a box's sides, as shares of the picture's."""
CELLS = 5
"""Independent values along each side of the random field from which blobs and strokes are cut."""
STROKE = 0.25
"""A stroke covers the field's values from minus this to plus this, in standard deviations."""


def boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes anywhere in the picture, bool (count, 1, H, W)."""
    draws = torch.rand(2, 2, count, 1, generator=generator, device=generator.device)
    inside = []
    for side, (length, place) in zip(size, draws, strict=True):
        long = SMALLEST + (LARGEST - SMALLEST) * length
        start = place * (1 - long)
        at = (torch.arange(side, device=generator.device) + 0.5) / side
        inside.append((at >= start) & (at < start + long))
    rows, columns = inside
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def blobs_and_strokes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Where smooth random fields are low (blobs), or close to zero (strokes): bool (count, 1, H, W)."""
    field = torch.randn(count, 1, CELLS, CELLS, generator=generator, device=generator.device)
    field = F.interpolate(field, size=size, mode="bicubic")
    level, kind = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device)
    return torch.where(kind < 0.5, field < level - 0.75, field.abs() < STROKE)


def random_masks(count: int, size: tuple[int, int], generator: torch.Generator, *, inverted: float) -> Tensor:
    """Random masks: half boxes, a quarter blobs, a quarter strokes.

    Args:
        count, size: number of masks; their height and width.
        generator: on the device of the masks.
        inverted: share of the masks that are inverted, for outpainting.

    Returns:
        bool (count, 1, height, width), true where the picture is to be painted. Some are all true or all false.
    """
    box, turn = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device)
    masks = torch.where(box < 0.5, boxes(count, size, generator), blobs_and_strokes(count, size, generator))
    return masks ^ (turn < inverted)
