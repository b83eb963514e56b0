"""Helpers for batches of pictures: resizing, similarity, and sheets."""

import torch
from PIL import Image
from torch import Tensor, nn

from cascade.sizes import semantic_size

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_pixels(pixels: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resizes pixels (B, 3, H, W) in 0..1, bilinear with antialiasing; ``size`` is one side or (height, width)."""
    return nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def normalise(pixels: Tensor, size: int) -> Tensor:
    """Pixels (B, 3, H, W) in 0..1 to the input of CLIP's vision tower: ``size`` pixels a side, CLIP's mean and deviation."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (resize_pixels(pixels, size).clamp(0, 1) - mean) / std


def for_previewer(pixels: Tensor) -> Tensor:
    """Resizes pixels (B, 3, H, W) to the size of their preview, which has 8 pixels for each semantic latent."""
    rows, columns = semantic_size(*pixels.shape[-2:])
    return resize_pixels(pixels, (8 * rows, 8 * columns))


def psnr(made: Tensor, true: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over a batch; both (B, 3, H, W) in 0..1. Equal pictures count as 100 dB."""
    errors = (made - true).square().mean(dim=(1, 2, 3))
    return (-10 * errors.clamp(min=1e-10).log10()).mean().item()


def ssim(made: Tensor, true: Tensor) -> float:
    """Mean structural similarity, at most 1; both (B, C, H, W) in 0..1.

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), with plain windows of 7 x 7
    pixels, channel by channel.
    """
    mean_made, mean_true = (nn.functional.avg_pool2d(one, 7, 1) for one in (made, true))
    variance_made, variance_true, covariance = (
        nn.functional.avg_pool2d(one * two, 7, 1) - mean_one * mean_two
        for one, two, mean_one, mean_two in (
            (made, made, mean_made, mean_made),
            (true, true, mean_true, mean_true),
            (made, true, mean_made, mean_true),
        )
    )
    small, smaller = 0.03**2, 0.01**2
    luminance = (2 * mean_made * mean_true + smaller) / (mean_made.square() + mean_true.square() + smaller)
    structure = (2 * covariance + small) / (variance_made + variance_true + small)
    return (luminance * structure).mean().item()


def grid(rows: list[Tensor]) -> Image.Image:
    """One sheet from rows of pictures, each (N, 3, H, W) in 0..1. All are resized to the pictures of the first row.

    No row may have more pictures than the first. Shorter rows are padded with black, and empty ones left out.
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
