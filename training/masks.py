"""Random masks for inpainting: what a person marks is a box, a blob or a stroke, or all but the picture to be continued."""

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 0.2, 0.9
"""A box's sides, in parts of the picture's."""
CELLS = 5
"""Independent values a side of the random field that blobs and strokes are cut from."""
STROKE = 0.25
"""Half the range of the field, in deviations, that a stroke covers."""


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
    """The low parts of smooth random fields, or the bands along their zero lines, bool (count, 1, H, W)."""
    field = torch.randn(count, 1, CELLS, CELLS, generator=generator, device=generator.device)
    field = F.interpolate(field, size=size, mode="bicubic")
    level, kind = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device)
    return torch.where(kind < 0.5, field < level - 0.75, field.abs() < STROKE)


def random_masks(count: int, size: tuple[int, int], generator: torch.Generator, *, inverted: float) -> Tensor:
    """Masks of which half are boxes, a quarter blobs, a quarter strokes.

    Args:
        count, size: number, height and width.
        generator: on the device where the masks are wanted.
        inverted: share that is turned inside out: outpainting.

    Returns:
        bool (count, 1, height, width), true where the picture is to be made anew. Some are all true or all false.
    """
    box, turn = torch.rand(2, count, 1, 1, 1, generator=generator, device=generator.device)
    masks = torch.where(box < 0.5, boxes(count, size, generator), blobs_and_strokes(count, size, generator))
    return masks ^ (turn < inverted)
