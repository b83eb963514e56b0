"""Masks: which pixels and which semantic latents are made anew, and how what is made is set into the image.

A mask of pixels is a bool array (H, W), true where the picture is made anew.
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
# Pixels from the mask's edge, inwards, over which the image fades into what is made.
SEAM = 8


def check_shape(mask: tuple[int, int], width: int, height: int) -> None:
    """Make sure that a mask of this (width, height) is one of an image of `width` x `height`: of its shape.

    Raises:
        InputError: it is not.
    """
    # One is the other, resized, but for the rounding of sides to whole pixels.
    if abs(mask[0] * height - mask[1] * width) > max(*mask, width, height):
        raise InputError(
            f"mask has {mask[0]}x{mask[1]} pixels, and image {width}x{height}; it must have the image's shape."
        )


def check_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """Make sure that a mask is one of an image of `width` x `height`, and that something is made anew.

    Returns:
        The mask in the image's size, of mode "1", which `read_mask` reads in a tenth of the time.

    Raises:
        InputError: the mask has another shape, or no white.
        ValueError: it has 32 bits a channel.
    """
    check_shape(mask.size, width, height)
    read = read_mask(mask, width, height)
    if not read.any():
        raise InputError("mask has no white, so that nothing of image would be made anew.")
    return Image.fromarray(read)


def read_mask(mask: Image.Image, width: int, height: int) -> np.ndarray:
    """A mask of any size and mode as bool (height, width). White and what is nearer to it than to black is true.

    What is transparent counts as black, so that white strokes on a transparent ground do what they show.

    Raises:
        ValueError: it has 32 bits a channel.
    """
    if mask.mode == "1" and mask.size == (width, height) and not mask.has_transparency_data:
        return np.array(mask)
    grey = to_rgb(mask, "mask", background="black").convert("L")
    return np.asarray(grey.resize((width, height), Image.Resampling.BOX)) >= WHITE


def transparent(image: Image.Image) -> Image.Image:
    """The mask, of mode "1", of what is transparent in an image by half and more.

    Args:
        image: of any size and mode.

    Raises:
        InputError: nothing is.
    """
    opaque = np.asarray(image.convert("RGBA").getchannel("A")) >= WHITE if image.has_transparency_data else np.True_
    if opaque.all():
        raise InputError(f"mask is {ALPHA!r}, which needs a transparent region in image; there is none.")
    return Image.fromarray(~opaque)


def latents_of(mask: np.ndarray, size: sizes.Size) -> Tensor:
    """The semantic latents, (h, w) = `size`, of which any pixel is in the mask: bool (1, 1, h, w).

    A mask whose size is no multiple of 8 is padded as the image is, see `decoder.encode_pixels`.
    """
    pixels = torch.from_numpy(mask).float()[None, None]
    return F.adaptive_max_pool2d(sizes.pad(pixels, *sizes.native_size(*mask.shape)), size).bool()


def set_into(image: Image.Image, made: Image.Image, mask: np.ndarray) -> Image.Image:
    """What was made where the mask is, the image everywhere else, exactly; the seam lies inside of the mask.

    Args:
        image, made: RGB, of the same size.
        mask: in that size.
    """
    # A border of the picture is no edge of the mask: distances are to pixels that are there.
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # A mask that is nowhere as deep as the seam, a thin stroke, still shows in full what was made.
    share = np.minimum(inside / min(SEAM, inside.max()), 1)[..., None]
    old, new = np.asarray(image, np.float32), np.asarray(made, np.float32)
    return Image.fromarray((old + share * (new - old)).round().astype(np.uint8))


def check_canvas(image: tuple[int, int], *added: int) -> tuple[int, int, int, int]:
    """Make sure that pixels can be added to an image of this (width, height): to the left, above, to the right, below.

    Raises:
        InputError: a number is not allowed, or all are 0; the canvas exceeds 2048 pixels.
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
    """An image on a larger canvas, and the mask of what is new there: outpainting is inpainting of that.

    Args:
        image: of any size and mode.
        mask: what of the image is made anew besides, as in `Request`; None: nothing.
        left, above, right, below: pixels to add, 0 to 2048, and at one side some.

    Returns:
        The canvas, RGB, which repeats the image's border pixels, and its mask.

    Raises:
        InputError: a number is not allowed, or all are 0; the canvas exceeds 2048 pixels; the mask has another shape.
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
