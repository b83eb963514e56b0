"""Masks: reads them, finds the masked semantic latents, and pastes a made picture into the original.

A mask of pixels is a bool array (H, W), true where the picture is repainted.
"""

from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from cascade import sizes
from cascade.images.colours import to_rgb
from cascade.limits import ALPHA, LIMITS, InputError

WHITE = 128
# Width of the blend in pixels, from the mask's edge inwards.
SEAM = 8


def check_shape(mask: tuple[int, int], width: int, height: int) -> None:
    """Make sure that a mask of this (width, height) has the aspect ratio of an image of `width` x `height`.

    Raises:
        InputError: it has another one.
    """
    # Allows for rounding when one was resized to the other.
    if abs(mask[0] * height - mask[1] * width) > max(*mask, width, height):
        raise InputError(
            f"mask has {mask[0]}x{mask[1]} pixels, and image {width}x{height}; it must have the image's shape."
        )


def check_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """Make sure that a mask has the aspect ratio of an image of `width` x `height`, and some white.

    Returns:
        The mask in the image's size, in mode "1", which `read_mask` reads ten times as fast.

    Raises:
        InputError: the mask has another aspect ratio, or no white.
        ValueError: it has 32 bits per channel.
    """
    check_shape(mask.size, width, height)
    read = read_mask(mask, width, height)
    if not read.any():
        raise InputError("mask has no white, so nothing of image would be repainted.")
    return Image.fromarray(read)


def read_mask(mask: Image.Image, width: int, height: int) -> np.ndarray:
    """A mask of any size and mode as bool (height, width). Grey of 128 or more is true.

    Transparent pixels count as black, so white strokes on a transparent background are a mask.

    Raises:
        ValueError: it has 32 bits per channel.
    """
    if mask.mode == "1" and mask.size == (width, height) and not mask.has_transparency_data:
        return np.array(mask)
    grey = to_rgb(mask, "mask", background="black").convert("L")
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX)) >= WHITE


def transparent(image: Image.Image) -> Image.Image:
    """The mask, in mode "1", of an image's pixels that are at least half transparent.

    Args:
        image: of any size and mode.

    Raises:
        InputError: there are none.
    """
    opaque = np.asarray(image.convert("RGBA").getchannel("A")) >= WHITE if image.has_transparency_data else np.True_
    if opaque.all():
        raise InputError(f"mask is {ALPHA!r}, which needs a transparent region in image; there is none.")
    return Image.fromarray(~opaque)


def latents_of(mask: np.ndarray, size: sizes.Size) -> Tensor:
    """The semantic latents of `size` (h, w) that have a pixel in the mask: bool (1, 1, h, w).

    A mask whose size is not a multiple of 8 is padded like the image, see `encoder.encode_pixels`.
    """
    pixels = torch.from_numpy(mask).float()[None, None]
    return F.adaptive_max_pool2d(sizes.pad(pixels, *sizes.native_size(*mask.shape)), size).bool()


def set_into(image: Image.Image, made: Image.Image, mask: np.ndarray) -> Image.Image:
    """Paste a made picture into an image where the mask is. They are blended inside of the mask only.

    Args:
        image, made: RGB, of the same size.
        mask: of that size.

    Returns:
        RGB. Pixels outside of the mask are exactly the image's.
    """
    # Distances to the nearest unmasked pixel. The picture's border is not an edge of the mask.
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # A thin stroke is narrower than the blend everywhere. The blend is shortened, so that the made picture shows in full.
    share = np.minimum(inside / min(SEAM, inside.max()), 1)[..., None]
    # Row by row: at 4096x4096, the whole in float32 would take 1 GB.
    pixels = np.array(image)
    for old, new, part in zip(pixels, np.asarray(made), share, strict=True):
        old[:] = (old + part * (new.astype(np.float32) - old)).round()
    return Image.fromarray(pixels)


def check_canvas(image: tuple[int, int], *added: int) -> tuple[int, int, int, int]:
    """Make sure that an image can be extended.

    Args:
        image: its (width, height) in pixels.
        added: pixels to add at the left, top, right and bottom.

    Returns:
        `added`, as whole numbers.

    Raises:
        InputError: a number is not allowed, all are 0, or a side of the canvas exceeds 4096 pixels.
    """
    left, above, right, below = added = LIMITS["outpaint"].check("outpaint", added)
    if not any(added):
        raise InputError("outpaint is 0, 0, 0, 0; one of its numbers must be above 0.")
    width, height = left + image[0] + right, above + image[1] + below
    if max(width, height) > sizes.LARGEST:
        raise InputError(
            f"outpaint is {', '.join(map(str, added))}, which makes {width}x{height} pixels of image's "
            f"{image[0]}x{image[1]}; each side may have {sizes.LARGEST}."
        )
    return added


def extend(
    image: Image.Image, mask: Image.Image | Literal["alpha"] | None, left: int, above: int, right: int, below: int
) -> tuple[Image.Image, Image.Image]:
    """Extend an image for outpainting, which is inpainting of the added area.

    Args:
        image: of any size and mode.
        mask: the part of the image to repaint too, as in `Request`; None: nothing.
        left, above, right, below: pixels to add, 0 to 4096, not all 0.

    Returns:
        The canvas, RGB, where the image's border pixels are repeated, and the mask of the added area and of `mask`.

    Raises:
        InputError: a number is not allowed, all are 0, a side of the canvas exceeds 4096 pixels, or the mask has another
            aspect ratio than the image.
    """
    LIMITS["image"].check_one("image", image)
    mask = LIMITS["mask"].check("mask", mask)
    left, above, right, below = check_canvas(image.size, left, above, right, below)
    if mask == ALPHA:
        mask = transparent(image)
    if mask is not None:
        check_shape(mask.size, *image.size)
    old = np.zeros((image.height, image.width), bool) if mask is None else read_mask(mask, *image.size)
    border = ((above, below), (left, right))
    canvas = np.pad(np.asarray(to_rgb(image)), (*border, (0, 0)), mode="edge")
    return Image.fromarray(canvas), Image.fromarray(np.pad(old, border, constant_values=True))
