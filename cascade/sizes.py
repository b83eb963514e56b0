"""Sizes of pictures and of their latents. Every pair is (height, width).

Per side, a decoder latent of Stage A covers 4 pixels, and Stage B folds 2 decoder latents into one. So pictures are made at
multiples of 8 pixels, and any other size is cropped from the middle of the next multiple. A semantic latent covers 42.67
pixels per side, or what a request calls its compression: the semantic encoder shrinks by 32, and reads pictures at three
quarters of their size, or at 32 / compression.
"""

import math

from torch import Tensor
from torch.nn import functional as F

SMALLEST, LARGEST = 64, 4096
# Up to this side, Stage B makes a picture as a whole, and above in tiles. Training and sizes that nobody chose stay below.
WHOLE = 2048
MULTIPLE = 8
SEMANTIC_PIXELS = 42.67
# The compressions with which the authors trained Stage B (`train/train_b.py`): pictures are encoded at 0.5 to 1 of their size.
DENSEST, SPARSEST = 32, 64
ENCODER_STRIDE = 32
STAGE_A_FACTOR = 4

Size = tuple[int, int]


def native_size(height: int, width: int) -> Size:
    """The size at which a picture of `height` x `width` is made: each side rounded up to a multiple of 8.

    Raises:
        ValueError: a side is not from 64 to 4096.
    """
    for name, side in (("height", height), ("width", width)):
        if not SMALLEST <= side <= LARGEST:
            raise ValueError(f"{name} is {side}; it must be from {SMALLEST} to {LARGEST} pixels.")
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def fitted_size(
    height: int, width: int, native: int, to_height: int | None = None, to_width: int | None = None
) -> Size:
    """A size with about the aspect ratio of `height` x `width` and about the native area.

    Args:
        height, width: at least 1 pixel.
        native: pixels, the side of the square with the native area.
        to_height, to_width: a side that the caller has chosen. The other one follows the aspect ratio instead of the area.

    Returns:
        Two sides from 64 to 4096, or to 2048 if the caller chose none. Sides that the caller did not choose are multiples of
        8.
    """
    if to_height is not None:
        scale = to_height / height
    elif to_width is not None:
        scale = to_width / width
    else:
        scale = min(native / math.sqrt(height * width), WHOLE / max(height, width))
    rows, columns = (min(max(round(side * scale / MULTIPLE) * MULTIPLE, SMALLEST), LARGEST) for side in (height, width))
    return rows if to_height is None else to_height, columns if to_width is None else to_width


def ratio_size(ratio: str, native: int) -> Size:
    """The size of exactly this aspect ratio, in multiples of 8, with about the native area.

    Args:
        ratio: width to height, as in "16:9".
        native: pixels, the side of the square with the native area.

    Returns:
        Two sides of at most 2048.
    """
    columns, rows = map(int, ratio.split(":"))
    shared = math.gcd(columns, rows)
    columns, rows = columns // shared, rows // shared
    unit = native / math.sqrt(columns * rows)
    largest = WHOLE // max(columns, rows) // MULTIPLE
    unit = MULTIPLE * min(max(round(unit / MULTIPLE), 1), largest)
    return rows * unit, columns * unit


def semantic_size(height: int, width: int, compression: float = SEMANTIC_PIXELS) -> Size:
    """The size of Stage C's latents for a picture in pixels: ceil(side / compression), as in the authors' code.

    compression: pixels, the side of a latent, 32 to 64.
    """
    return math.ceil(height / compression), math.ceil(width / compression)


def is_whole(height: int, width: int) -> bool:
    """Whether Stage B makes a picture of this size, in pixels, as a whole: not in tiles."""
    return max(height, width) <= WHOLE


def decoder_size(height: int, width: int) -> Size:
    """The size of Stage B's latents for a picture: a quarter of each side.

    Raises:
        ValueError: a side is not a multiple of 8.
    """
    if height % MULTIPLE or width % MULTIPLE:
        raise ValueError(f"The size is {height}x{width}; both sides must be multiples of {MULTIPLE}.")
    return height // STAGE_A_FACTOR, width // STAGE_A_FACTOR


def encoder_size(height: int, width: int, compression: float = SEMANTIC_PIXELS) -> Size:
    """The size in pixels at which the semantic encoder reads a picture, so that its latents have `semantic_size`."""
    rows, columns = semantic_size(height, width, compression)
    return rows * ENCODER_STRIDE, columns * ENCODER_STRIDE


def crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Crop the middle of (..., H, W) to (..., height, width). If the rest is odd, one more is cut at the right and bottom."""
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def pad(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pad (B, C, H, W) to (B, C, height, width) by repeating the border. `crop` undoes it."""
    rows, columns = height - pixels.shape[-2], width - pixels.shape[-1]
    top, left = rows // 2, columns // 2
    return F.pad(pixels, (left, columns - left, top, rows - top), mode="replicate")
