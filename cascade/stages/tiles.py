"""Stage B in overlapping tiles, for pictures that are too large for it as a whole.

All tiles of a picture have one size, so that one CUDA graph serves them. Noise and condition map are those of the whole
picture. The predictions of the tiles are blended in every step (MultiDiffusion, arXiv 2302.08113). Attention and response norms
see one tile. Norms over all tiles would need all of them in every block at once, and bring a picture hardly nearer to the same
one made as a whole: from 39.4 to 39.8 dB at 2048x2048, from 32.7 to 32.9 dB at 1024x1024 in tiles of 512 pixels (the miniature,
in tiles of up to 1216 pixels).
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.networks.protocol import UNet
from cascade.networks.unet import Conditions, resize

# Latents, the largest edge of a tile: 1536 pixels. Up to 2048, Stage B makes a picture as a whole. At 4096x4096, nine tiles of
# this edge have 1.27 times the latents of the picture; sixteen of 304, 1.41 times.
TILE = 384
# Latents that neighbours share, at least: 256 pixels. Two pictures of 2048x2048 by the miniature, a scooter and an apple, in four
# tiles and as a whole, differ by 30.2 and 36.1 dB PSNR with 128 pixels, by 35.6 and 38.3 with 256, and 36.3 and 39.2 with 384.
OVERLAP = 64
# Edges are multiples of this, and tiles begin at multiples of it, except the last ones, so that they are shrunk as the whole
# would be.
GRID = 16


class Part(NamedTuple):
    """Some tiles of a step have been predicted, and others are still to come.

    Attributes:
        done, total: the number of tiles predicted so far, and of all.
    """

    done: int
    total: int


Predict = Callable[[Tensor, Tensor], Generator[Part, None, Tensor]]
"""(x, t) -> epsilon, as `Sampling` has them. Yields a `Part` wherever the caller may stop."""


@dataclass(frozen=True)
class Tiles:
    """How decoder latents are divided.

    Attributes:
        height, width: of the latents.
    """

    height: int
    width: int

    @property
    def edges(self) -> tuple[int, int]:
        """(height, width) of each tile."""
        return edge(self.height), edge(self.width)

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(top, left) of each tile, row by row."""
        return list(product(starts(self.height), starts(self.width)))

    def __len__(self) -> int:
        return len(self.places)

    def cut(self, x: Tensor, place: tuple[int, int], shrunk: int = 1) -> Tensor:
        """The tile of (..., height / shrunk, width / shrunk) at a place."""
        (top, left), (height, width) = place, self.edges
        rows, columns = slice(top // shrunk, (top + height) // shrunk), slice(left // shrunk, (left + width) // shrunk)
        return x[..., rows, columns]

    def windows(self) -> list[Tensor]:
        """The weight of each tile's prediction, float32 (height, width) of a tile. They add up to 1 everywhere."""
        rows, columns = ramps(self.height), ramps(self.width)
        return [row[:, None] * column for row, column in product(rows, columns)]

    def groups(self, at_once: int) -> list[list[int]]:
        """The numbers of the tiles that are predicted together, at most `at_once`, in groups as equal as possible."""
        count = -(-len(self) // at_once)
        bounds = [len(self) * i // count for i in range(count + 1)]
        return [list(range(first, last)) for first, last in pairwise(bounds)]


def edge(side: int) -> int:
    """The edge of the tiles along a side of `side` latents: the smallest with which the fewest tiles overlap enough."""
    count = _count(side)
    if count == 1:
        return side
    found = math.ceil((side + (count - 1) * OVERLAP) / count / GRID) * GRID
    while any(one + found - other < OVERLAP for one, other in pairwise(_begins(side, found, count))):
        found += GRID
    return found


def starts(side: int) -> list[int]:
    """Where the tiles along a side of `side` latents begin."""
    return _begins(side, edge(side), _count(side))


def _count(side: int) -> int:
    return 1 if side <= TILE else math.ceil((side - OVERLAP) / (TILE - OVERLAP))


def _begins(side: int, length: int, count: int) -> list[int]:
    last = count - 1
    return [*(((side - length) * i // last + GRID // 2) // GRID * GRID for i in range(last)), side - length]


def ramps(side: int) -> list[Tensor]:
    """The weights of the tiles along a side, float32 (edge,) each. Towards a neighbour, they fall as a squared cosine."""
    length, begins = edge(side), starts(side)
    at, weights = torch.arange(length) + 0.5, []
    for number, begin in enumerate(begins):
        weight = torch.ones(length)
        if number:
            shared = begins[number - 1] + length - begin
            weight *= torch.sin((at / shared).clamp(max=1) * math.pi / 2).square()
        if number < len(begins) - 1:
            shared = begin + length - begins[number + 1]
            weight *= torch.sin(((length - at) / shared).clamp(max=1) * math.pi / 2).square()
        weights.append(weight)
    total = torch.zeros(side)
    for begin, weight in zip(begins, weights, strict=True):
        total[begin : begin + length] += weight
    return [weight / total[begin : begin + length] for begin, weight in zip(begins, weights, strict=True)]


@torch.no_grad()
def condition_in_bands(decoder: UNet, pooled: Tensor, semantic: Tensor, tiles: Tiles) -> Conditions:
    """The conditions of all decoder latents, like `StableCascadeUNet.condition`.

    Computes the map in bands: at 4096x4096, a layer of it has 1.3 GB for a picture with guidance, in 16 bits.
    """
    patch = decoder.config.patch_size
    # Enlarged as a whole, because the scale depends on the size. The network leaves a map that has its size as it is.
    enlarged = resize(semantic.float(), [tiles.height // patch, tiles.width // patch])
    whole, top = None, 0
    for band in enlarged.split(TILE // patch, dim=-2):
        rows, columns = band.shape[-2:]
        size = rows * patch, columns * patch
        conditions = decoder.condition(pooled, effnet=band.contiguous(), latent_size=size)
        if whole is None:
            batch, _, _, channels = conditions.feature_map.shape
            whole = conditions.feature_map.new_empty(batch, enlarged.shape[-2], columns, channels)
        whole[:, top : top + rows] = conditions.feature_map
        top += rows
    return conditions._replace(feature_map=whole)


def predict_tiles(decoder: UNet, conditions: Conditions, tiles: Tiles, at_once: int) -> Predict:
    """Stage B's prediction for latents (B, 4, height, width), in tiles.

    Args:
        decoder: Stage B.
        conditions: from `condition_in_bands`, for a batch of B.
        tiles: how the latents are divided.
        at_once: how many tiles are predicted together, at most.
    """
    groups, device = tiles.groups(at_once), conditions.feature_map.device
    windows = [window.to(device) for window in tiles.windows()]
    given = {len(group): _repeated(conditions, len(group)) for group in groups}
    # (B, channels, h, w), so that tiles are cut from it like from latents.
    map_of_all = conditions.feature_map.permute(0, 3, 1, 2)
    patch = decoder.config.patch_size

    def cut(x: Tensor, group: Sequence[int], shrunk: int = 1) -> Tensor:
        """Tile by tile, and each of the whole batch."""
        return torch.cat([tiles.cut(x, tiles.places[number], shrunk) for number in group])

    def predict(x: Tensor, t: Tensor) -> Generator[Part, None, Tensor]:
        blended = torch.zeros_like(x)
        for group in groups:
            if group[0]:
                yield Part(group[0], len(tiles))
            with torch.no_grad():
                own = cut(map_of_all, group, patch).permute(0, 2, 3, 1).contiguous()
                made = decoder(cut(x, group), t.repeat(len(group)), given[len(group)]._replace(feature_map=own))
                for number, tile in zip(group, made.split(len(x)), strict=True):
                    tiles.cut(blended, tiles.places[number]).add_(tile * windows[number])
        return blended

    return predict


def _repeated(conditions: Conditions, times: int) -> Conditions:
    """Keys and values for `times` tiles of each sample."""
    keys, values = (tuple(x.repeat(times, 1, 1, 1) for x in some) for some in (conditions.keys, conditions.values))
    return Conditions(keys, values, None)
