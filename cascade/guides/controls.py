"""Control images, and their tensors for ControlNets, as in Stability-AI/StableCascade `modules/controlnet.py`.

Pictures are RGB (B, 3, H, W) in 0..1. Controls are float32 on the pictures' device.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cascade import sizes
from cascade.limits import LIMITS, InputError, Limits

CANNY_SIDE = 224
CANNY_THRESHOLDS = (100, 200)
CANNY_SIDES = Limits(int, low=1, high=sizes.LARGEST)
# Each attribute of a control, and the input that lists its values. Start and end are pairs there.
INPUTS = {
    "kind": "control_types",
    "image": "control_images",
    "scale": "control_scales",
    "start": "control_ranges",
    "end": "control_ranges",
}


@dataclass(frozen=True)
class Control:
    """An image with which a ControlNet guides Stage C.

    Attributes:
        kind: "canny": pictures get the image's edges. "inpainting": pictures continue the image inside of the mask.
            "super_resolution": pictures show the image at twice its size.
        image: of any size and mode. It is scaled to the pictures' size, for "super_resolution" to half of it, and what
            exceeds their aspect ratio is cropped evenly.
        scale: 0 to 2, factor for the ControlNet's residuals.
        start, end: the part of Stage C's steps that it guides: step i of n, from 0, if start <= i / n < end, where
            0 <= start < end <= 1.
        canny_side: pixels, 1 to 4096, see `canny`; None: full size, where edges are finer than those that the published
            network was trained on.

    Raises:
        InputError: an attribute has the wrong type or is out of range.
    """

    kind: str
    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    canny_side: int | None = CANNY_SIDE

    def __post_init__(self) -> None:
        for name, given in INPUTS.items():
            object.__setattr__(self, name, LIMITS[given].check_one(f"Control.{name}", getattr(self, name)))
        CANNY_SIDES.check("Control.canny_side", self.canny_side)
        check_span("Control.start", self.start, "Control.end", self.end)


def check_span(start_name: str, start: float, end_name: str, end: float) -> None:
    """Make sure that a control starts before it ends.

    Args:
        start_name, end_name: their names in the error.
        start, end: each 0 to 1.

    Raises:
        InputError: it does not.
    """
    if start >= end:
        raise InputError(f"{start_name} is {start}; it must be less than {end_name}, which is {end}.")


def canny(pixels: Tensor, side: int | None = CANNY_SIDE) -> Tensor:
    """Detect edges: (B, 1, H, W) in 0..1.

    Args:
        pixels: pictures (B, 3, H, W).
        side: pixels. Edges are detected at side x side and resized to H x W. The published network was trained on edges at
            224 x 224. None detects them at full size: thin lines with values 0 and 1 only.

    Raises:
        ValueError: there are not three channels.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels has the shape {tuple(pixels.shape)}; canny takes (batch, 3, height, width).")
    resized = pixels.float()
    if side is not None:
        resized = F.interpolate(resized, size=(side, side), mode="bilinear")
    images = resized.mul(255).permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    edges = np.stack([cv2.Canny(image, *CANNY_THRESHOLDS) for image in images])
    control = torch.from_numpy(edges)[:, None].to(pixels.device).float() / 255
    return control if side is None else F.interpolate(control, size=pixels.shape[-2:], mode="bilinear")


def inpainting(pixels: Tensor, mask: Tensor) -> Tensor:
    """The pictures with masked pixels in white, and the mask as the fourth channel: (B, 4, H, W).

    Args:
        pixels: pictures (B, 3, H, W).
        mask: bool (B, 1, H, W), true where the picture is repainted.

    Raises:
        ValueError: the mask has another shape or dtype.
    """
    expected = (pixels.shape[0], 1, *pixels.shape[-2:])
    if mask.dtype != torch.bool or tuple(mask.shape) != expected:
        raise ValueError(f"mask is {mask.dtype} of the shape {tuple(mask.shape)}; it must be torch.bool of {expected}.")
    pixels = pixels.float()
    return torch.cat([pixels.masked_fill(mask, 1), mask.to(pixels.dtype)], dim=1)


def super_resolution(latents: Tensor) -> Tensor:
    """Repeat each latent 2 x 2 times: (B, 16, 2h, 2w), the control for a picture of twice the size.

    latents: semantic latents (B, 16, h, w) of the picture to enlarge.
    """
    return F.interpolate(latents, scale_factor=2, mode="nearest")
