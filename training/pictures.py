"""Small helpers for batches of pictures: resizing as the encoders expect it, and sheets to look at."""

import torch
from PIL import Image
from torch import Tensor, nn


def resize(pixels: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Pixels (B, 3, H, W) in 0..1 to ``size``, bilinear with antialiasing."""
    return nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def grid(rows: list[Tensor]) -> Image.Image:
    """One sheet from rows of pictures, each (N, 3, H, W) in 0..1; rows are brought to the height of the first."""
    height, width = rows[0].shape[-2:]
    lines = []
    for row in rows:
        if row.shape[-2:] != (height, width):
            row = nn.functional.interpolate(row.float(), size=(height, width), mode="nearest")
        lines.append(torch.cat(list(row.float().clamp(0, 1)), dim=-1))
    sheet = torch.cat(lines, dim=-2).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(sheet)
