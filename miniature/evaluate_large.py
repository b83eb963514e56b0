"""Do pictures larger than the miniature's own still show one object once, and what do tiles change?

Makes pictures of one object each, of several sizes and compressions. The judge names the object, and the number of its parts
is compared with the true scene's. Also compares pictures whose decoder latents are made in tiles with the same pictures made
as a whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cascade import sizes
from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.sampling import Noise, finish
from cascade.stages.decoder import SAMPLES, decoder_steps
from cascade.stages.pixels import decode_pixels
from cascade.stages.tiles import GRID, Tiles
from miniature.compose import compose
from miniature.evaluate import Pictures
from miniature.judge import Judge, background_plane, silhouettes
from miniature.prompts import Prompt, make_prompts, plans_of
from miniature.scores import Values
from training.pictures import psnr

USUAL = sizes.SEMANTIC_PIXELS
CASES = ((256, 256, USUAL), (512, 512, USUAL), (512, 512, 64.0), (1024, 512, USUAL), (1024, 512, 64.0))
"""Width, height and compression. The first is what the miniature was trained on."""

PART = 0.2
"""Share of the largest part's area from which on a part counts: of an object, or a second object."""
COUNTED_AT = 128
"""Pixels of the shorter side at which parts are counted, so that hairlines do not divide an object."""
WHOLE_SIDE = sizes.WHOLE
"""Pixels of a side of the pictures that are made in tiles and as a whole."""


@dataclass(frozen=True)
class Large:
    """The scores of larger pictures.

    Attributes:
        objects: {size and compression: {"object first", "one object": a value a picture}}; of each size the true scenes, too.
        psnr: in dB, of pictures in tiles beside the same ones made as a whole.
        seams: of these pictures, {"in tiles", "as a whole": see `seam`}.
        pictures: by what made them; those of one column have one size.
    """

    objects: dict[str, Values]
    psnr: list[float]
    seams: dict[str, float]
    pictures: Pictures


def evaluate_large(
    cascade: Cascade, judge: Judge, drawings: Tensor, seed: int, count: int = 200, tiled: int = 4
) -> Large:
    """Scores of ``count`` prompts in each of `CASES`, and of ``tiled`` pictures in tiles.

    ``drawings`` are those of the judge. Prompts name a style: so it is known how many parts an object has.
    """
    prompts = [
        prompt
        for prompt in make_prompts(judge.names, judge.styles, seed, 5 * count + 20)
        if len(prompt.objects) == 1 and prompt.style is not None
    ][:count]
    objects, made = {}, {}
    for width, height, compression in CASES:
        name = f"{width}x{height} at {compression:g}"
        requests = [
            Request(one.text, seed=one.seed, width=width, height=height, compression=compression) for one in prompts
        ]
        with tqdm(total=len(requests), desc=name) as bar:
            batch = cascade.batch(requests, lambda progress, bar=bar: bar.update(progress.image is not None))
        made[name] = [picture for (picture,) in batch]
        true = list(scenes(judge, drawings, prompts, (height, width)))
        objects.setdefault(f"scenes of {width}x{height}", judged(judge, true, true, prompts))
        pixels = [to_pixels(picture, judge.device)[0] for picture in made[name]]
        objects[name] = judged(judge, pixels, true, prompts)
    return Large(objects, *tiles_beside_whole(cascade, judge, drawings, prompts[:tiled]), made)


def judged(judge: Judge, pictures: Sequence[Tensor], true: Sequence[Tensor], prompts: Sequence[Prompt]) -> Values:
    """For each picture (3, H, W), whether it shows the prompt's object, and no more parts than the true scene."""
    pairs = zip(pictures, prompts, strict=True)
    return {
        "object first": [
            float(judge.ranked(squared(one), prompt.style)[0][0] == prompt.objects[0]) for one, prompt in pairs
        ],
        "one object": [float(parts(one) <= parts(scene)) for one, scene in zip(pictures, true, strict=True)],
    }


def scenes(judge: Judge, drawings: Tensor, prompts: Sequence[Prompt], size: sizes.Size) -> Iterator[Tensor]:
    """The true scenes of prompts, float32 (3, height, width), one by one."""
    for prompt in prompts:
        plan = plans_of([prompt], judge.names, judge.styles)
        yield compose(drawings, plan, len(judge.styles), size)[0].to(judge.device)


def backdrop(picture: Tensor) -> Tensor:
    """The plane of colour behind the object of a picture (3, H, W) of any shape: see `judge.background_plane`."""
    height, width = picture.shape[-2:]
    side = min(height, width)
    square = F.interpolate(picture[None], (side, side), mode="area")
    return F.interpolate(background_plane(square), (height, width), mode="bilinear", align_corners=True)[0]


def squared(picture: Tensor) -> Tensor:
    """A picture (3, H, W) for the judge: (3, S, S). If it is not square, its background becomes plain, and is continued."""
    height, width = picture.shape[-2:]
    if height == width:
        return picture
    plane = backdrop(picture)
    plain = plane.mean((1, 2), keepdim=True)
    made = plain.repeat(1, *(max(height, width),) * 2)
    sizes.crop(made, height, width).copy_(picture - plane + plain)
    return made


def parts(picture: Tensor) -> int:
    """How many parts a picture (3, H, W) in 0..1 shows on its background; those below `PART` of the largest do not count."""
    height, width = picture.shape[-2:]
    mask = silhouettes((picture - backdrop(picture))[None])[None].float()
    scale = COUNTED_AT / min(height, width)
    small = F.interpolate(mask, (round(height * scale), round(width * scale)), mode="area")[0, 0] >= 0.5
    _, _, found, _ = cv2.connectedComponentsWithStats(small.cpu().numpy().astype(np.uint8))
    areas = found[1:, cv2.CC_STAT_AREA]
    return int((areas >= PART * areas.max()).sum()) if len(areas) else 0


@torch.no_grad()
def tiles_beside_whole(
    cascade: Cascade, judge: Judge, drawings: Tensor, prompts: Sequence[Prompt]
) -> tuple[list[float], dict[str, float]]:
    """Scenes of `WHOLE_SIDE`, repainted from their semantic latents by Stages B and A: as a whole, and Stage B in tiles.

    Returns:
        `Large.psnr` and `Large.seams`.
    """
    size = sizes.decoder_size(WHOLE_SIDE, WHOLE_SIDE)
    made: dict[str, list[Tensor]] = {"in tiles": [], "as a whole": []}
    for prompt, scene in zip(prompts, scenes(judge, drawings, prompts, (WHOLE_SIDE, WHOLE_SIDE)), strict=True):
        semantic, pooled = cascade.encode(to_image(scene)), cascade.text.encode([prompt.text]).pooled
        for how, at_once in (("in tiles", SAMPLES), ("as a whole", None)):
            noise = Noise([prompt.seed], cascade.device)
            options = {"size": size, "noise": noise, "guidance": 1.0, "at_once": at_once}
            latents = finish(decoder_steps(cascade.decoder, semantic, pooled, **options))
            made[how] += (one.cpu() for one in decode_pixels(cascade.vqgan, latents, cascade.stage_a_scale, tile=256))
    pairs = zip(*made.values(), strict=True)
    decibels = [psnr(tiled[None], whole[None]) for tiled, whole in pairs]
    return decibels, {how: seam(pictures, Tiles(*size)) for how, pictures in made.items()}


def seam(pictures: Sequence[Tensor], tiles: Tiles) -> float:
    """The mean step between neighbouring pixels across the edges of tiles, over that at other places nearby, of all pictures.

    These places are one or two times `GRID` latents away: there, a picture made as a whole has larger steps, too. Where edges
    of tiles meet edges of objects, the whole shows it.
    """
    factor = sizes.STAGE_A_FACTOR
    across, beside = [], []
    for picture, axis in product(pictures, (1, 2)):
        steps = picture.diff(dim=axis).abs().mean(dim=[other for other in (0, 1, 2) if other != axis])
        edge, side = tiles.edges[axis - 1], picture.shape[axis]
        begins = {place[axis - 1] for place in tiles.places}
        for at in (factor * one for one in {*begins, *(begin + edge for begin in begins)}):
            if 0 < at < side:
                near = [one for times in (-2, -1, 1, 2) if 0 < (one := at + factor * GRID * times) < side]
                across.append(steps[at - 1].item())
                beside.append(sum(steps[one - 1].item() for one in near) / len(near))
    return sum(across) / sum(beside)
