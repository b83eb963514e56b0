"""Stage A: decoder latents -> pixels, whole or in tiles."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cascade import sizes
from cascade.networks.stage_a import StageA

# Smallest tile edge, in latents. With its margin such a tile is five times as large.
SMALLEST_TILE = 24
# Bytes for each latent, each channel of the widest level and each byte of dtype: a quarter more than measured (H100).
DECODING_BYTES = 24


@torch.no_grad()
def decode_pixels(
    vqgan: StageA, latents: Tensor, scale: float | None = None, tile: int | None = None
) -> Iterator[Tensor]:
    """Stage B's latents (B, 4, h, w) -> pictures, float32 (3, 4h, 4w) in 0..1, one by one, because pixels take memory.

    Pixels that Stage A makes not finite are NaN.

    Args:
        vqgan: Stage A.
        scale: factor on the latents; None: the one in Stage A's configuration.
        tile: latents, at least 1: pictures are made in squares of this edge, see `tile_within`. Each is decoded with a
            margin as wide as Stage A's receptive field, so that it equals its part of the whole. None: the whole at once.
    """
    height, width = latents.shape[-2:]
    tile = tile or max(height, width)
    margin, factor = vqgan.reach, vqgan.factor
    for one in latents.to(vqgan.dtype).split(1):
        if tile >= max(height, width):
            yield _in_range(vqgan.decode(one, scale=scale)[0])
            continue
        pixels = one.new_empty(3, factor * height, factor * width, dtype=torch.float32)
        for top, left in itertools.product(range(0, height, tile), range(0, width, tile)):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = vqgan.decode(one[..., above : top + tile + margin, before : left + tile + margin], scale=scale)[0]
            place = pixels[:, factor * top : factor * (top + tile), factor * left : factor * (left + tile)]
            part = part[:, factor * (top - above) :, factor * (left - before) :]
            place.copy_(_in_range(part[:, : place.shape[1], : place.shape[2]]))
        yield pixels


def _in_range(pixels: Tensor) -> Tensor:
    """New pixels, float32 in 0..1; NaN where they are not finite: clamped, infinite ones would be white or black."""
    return torch.where(pixels.isfinite(), pixels, math.nan).float().clamp_(0, 1)


def decoding_bytes(vqgan: StageA, height: int, width: int) -> int:
    """About how many bytes Stage A needs to decode (height, width) latents at once: 0.9 GiB for 256 x 256 in bfloat16
    (H100)."""
    return DECODING_BYTES * vqgan.config.embed_dim * vqgan.dtype.itemsize * height * width


def most_bytes(vqgan: StageA, height: int, width: int) -> int:
    """How many bytes Stage A may need for (height, width) latents: what it needs for those of the largest picture that is made
    as a whole. More would only save the tiles' margins."""
    most = sizes.WHOLE // sizes.STAGE_A_FACTOR
    return decoding_bytes(vqgan, min(height, most), min(width, most))


def tile_within(vqgan: StageA, height: int, width: int, limit: int) -> int:
    """The tile edge for (height, width) latents with which Stage A needs at most `limit` bytes, or the smallest edge."""
    tile, around = max(height, width), 2 * vqgan.reach
    while tile > SMALLEST_TILE:
        if decoding_bytes(vqgan, min(height, tile + around), min(width, tile + around)) <= limit:
            break
        tile = max(-(-tile // 2), SMALLEST_TILE)
    return tile
