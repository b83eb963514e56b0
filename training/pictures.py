"""Small helpers for batches of pictures: the sizes that the networks take, and sheets to look at."""

import torch
from PIL import Image
from torch import Tensor, nn

from cascade.sizes import semantic_size


def resize(pixels: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Pixels (B, 3, H, W) in 0..1 to ``size``, bilinear with antialiasing."""
    return nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def for_previewer(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) at the size of their preview: 8 pixels a semantic latent."""
    rows, columns = semantic_size(*pixels.shape[-2:])
    return resize(pixels, (8 * rows, 8 * columns))


def psnr(made: Tensor, true: Tensor) -> float:
    """Mean over a batch of the peak signal-to-noise ratio in dB; both (B, 3, H, W) in 0..1. Equal pictures count 100 dB."""
    errors = (made - true).square().mean(dim=(1, 2, 3))
    return (-10 * errors.clamp(min=1e-10).log10()).mean().item()


def grid(rows: list[Tensor]) -> Image.Image:
    """One sheet from rows of pictures, each (N, 3, H, W) in 0..1; rows are brought to the height of the first.

    No row may have more pictures than the first. Those with fewer are filled up with black, and empty ones left out.
    """
    height, width = rows[0].shape[-2:]
    lines: list[Tensor] = []
    for row in filter(len, rows):
        if row.shape[-2:] != (height, width):
            row = nn.functional.interpolate(row.float(), size=(height, width), mode="nearest")
        line = torch.cat(list(row.float().clamp(0, 1)), dim=-1)
        lines.append(nn.functional.pad(line, (0, len(rows[0]) * width - line.shape[-1])))
    sheet = torch.cat(lines, dim=-2).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(sheet)
