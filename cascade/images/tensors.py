"""Converts pictures to tensors and back. Tensors are RGB, float32 in 0..1."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cascade.images.colours import to_rgb


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """Convert a picture of any mode to RGB, and scale it to this size. What exceeds the aspect ratio is cropped evenly."""
    return ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> an RGB picture."""
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def to_pixels(image: Image.Image, device: str | torch.device = "cpu") -> Tensor:
    """A picture of any mode -> float32 (1, 3, H, W) in 0..1. Transparent parts are composited onto white."""
    pixels = torch.from_numpy(np.array(to_rgb(image))).to(device)  # transferred as uint8, a quarter of the bytes
    return pixels.permute(2, 0, 1)[None].float() / 255
