"""How well does a miniature use images? Scores of what it makes of scenes of one object each.

Anything that makes a picture of a `Request` can be judged. Objects count in any style.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from cascade.guides import controls
from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from miniature.captions import Captioner
from miniature.compose import compose
from miniature.dataset import say_less
from miniature.evaluate import Prompt, plans_of
from miniature.judge import Judge
from miniature.scenes import MARGIN, PLACE_NAMES, Plans
from training.pictures import ssim

logger = logging.getLogger(__name__)

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
TOLERANCE = 2
"""Pixels that an edge may be off, in either direction."""

Generate = Callable[[Request], Image.Image]


@dataclass(frozen=True)
class Scene:
    """A true scene of one object.

    Attributes:
        prompt, plan: what it shows; `plan` is one.
        image: RGB, square.
        other: a prompt for the same with another object, `other_name`.
        quiet: a prompt for the same that says neither place, size nor style.
    """

    prompt: Prompt
    plan: Plans
    image: Image.Image
    other: str
    other_name: str
    quiet: str


@dataclass(frozen=True)
class Outcome:
    """What a use of images came to.

    Attributes:
        scores: shares in 0..1 by name, a column a way to make pictures; for `evaluate.table`.
        pictures: by what they are.
    """

    scores: dict[str, dict[str, float]]
    pictures: dict[str, list[Image.Image]]


def make_scenes(
    prompts: Sequence[Prompt], drawings: Tensor, names: Sequence[str], styles: Sequence[str], side: int
) -> list[Scene]:
    """The scenes, of `side` pixels, that prompts of one object speak of; the rest as `load_drawings` has it."""
    plans = plans_of(prompts, names, styles)
    images = compose(drawings, plans, len(styles), (side, side))
    captioner = Captioner(names, styles)
    scenes = []
    for i, prompt in enumerate(prompts):
        rng = random.Random(prompt.seed)
        other = rng.choice([name for name in names if name != prompt.objects[0]])
        swapped = plans_of([replace(prompt, objects=(other,))], names, styles)
        (other_text,) = captioner.captions(swapped, rng)
        (quiet,) = captioner.captions(say_less(plans[[i]], 1.0, prompt.seed), rng)
        scenes.append(Scene(prompt, plans[[i]], to_image(images[i]), other_text, other, quiet))
    return scenes


def edge_f1(made: Tensor, true: Tensor, tolerance: int) -> float:
    """How well edges agree: the harmonic mean of precision and recall.

    Args:
        made, true: bool (H, W), true on an edge.
        tolerance: an edge's pixel is right where the other picture has one at most this many rows and columns away.

    Returns:
        0..1; two pictures without edges agree in full.
    """
    if not made.any() or not true.any():
        return float(made.any() == true.any())
    precision, recall = (
        _near(other, tolerance)[one].float().mean().item() for one, other in ((made, true), (true, made))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(edges: Tensor, tolerance: int) -> Tensor:
    return F.max_pool2d(edges[None].float(), 2 * tolerance + 1, 1, tolerance)[0] > 0


def edges_of(image: Image.Image) -> Tensor:
    """Where a picture has edges, found at its full size: bool (H, W)."""
    return controls.canny(to_pixels(image), side=None)[0, 0] > 0


def object_mask(scene: Scene) -> Image.Image:
    """White over a scene's object, and a margin around it; all of the rest is background."""
    side = scene.image.width
    reach = scene.plan.sizes[0, 0] / 2 + MARGIN
    at = (np.arange(side) + 0.5) / side
    columns, rows = (np.abs(at - centre) <= reach for centre in scene.plan.centres[0, 0])
    return Image.fromarray((rows[:, None] & columns[None, :]).astype(np.uint8) * 255)


def variation(generate: Generate, judge: Judge, scenes: Sequence[Scene]) -> Outcome:
    """Pictures after a scene alone, without a word."""
    pictures = [
        generate(Request("", image_prompts=(scene.image,), seed=scene.prompt.seed))
        for scene in tqdm(scenes, desc="variation")
    ]
    return Outcome({"variation": _objects(judge, pictures, _names(scenes))}, {"variation": pictures})


def image_to_image(generate: Generate, judge: Judge, scenes: Sequence[Scene]) -> Outcome:
    """Scenes painted anew at each of `STRENGTHS`, with prompts that leave place, size and style to the image.

    With their own captions, which say all of a scene, similarity hardly depends on the strength: there, at the least of them,
    it is whether the object stays that counts.
    """
    prompts = {f"{strength}": (strength, [scene.quiet for scene in scenes]) for strength in STRENGTHS}
    prompts[f"{STRENGTHS[0]} with full caption"] = (STRENGTHS[0], [scene.prompt.text for scene in scenes])
    scores, made = {}, {}
    for column, (strength, texts) in prompts.items():
        pictures = [
            generate(Request(text, image=scene.image, prompt_strength=strength, seed=scene.prompt.seed))
            for text, scene in zip(tqdm(texts, desc=f"image-to-image {column}"), scenes, strict=True)
        ]
        similarity = [ssim(to_pixels(p), to_pixels(s.image)) for p, s in zip(pictures, scenes, strict=True)]
        scores[column] = {"similarity": _mean(similarity), **_objects(judge, pictures, _names(scenes))}
        made[f"image-to-image {column}"] = pictures
    return Outcome(scores, made)


def inpainting(generate: Generate, judge: Judge, scenes: Sequence[Scene]) -> Outcome:
    """Another object in the place of each scene's own."""
    pictures, changed = [], []
    for scene in tqdm(scenes, desc="inpainting"):
        mask = object_mask(scene)
        picture = generate(Request(scene.other, image=scene.image, mask=mask, seed=scene.prompt.seed))
        outside = np.asarray(mask) == 0
        changed.append((np.asarray(picture) != np.asarray(scene.image)).any(axis=-1)[outside].any())
        pictures.append(picture)
    scores = _objects(judge, pictures, [scene.other_name for scene in scenes])
    return Outcome({"inpainting": {**scores, "changed outside": _mean(changed)}}, {"inpainting": pictures})


def reconstruction(reconstruct: Callable[[Image.Image], Image.Image], judge: Judge, scenes: Sequence[Scene]) -> Outcome:
    """What `reconstruct` leaves of the scenes."""
    pictures = [reconstruct(scene.image) for scene in tqdm(scenes, desc="reconstruction")]
    return Outcome({"reconstruction": _objects(judge, pictures, _names(scenes))}, {"reconstruction": pictures})


def canny(generate: Generate, reconstruct: Callable[[Image.Image], Image.Image], scenes: Sequence[Scene]) -> Outcome:
    """Pictures that follow the scenes' edges, those without that control, and the most that Stages B and A let pass.

    Prompts say neither place, size nor style, and only scenes count whose place or size is not the usual one: on all of them,
    F1 is 0.39 without control, and 0.66 with full captions, where true latents give 0.71, which leaves a control little to
    show (40 scenes of the shipped miniature).
    """
    scenes = [s for s in scenes if s.prompt.place != PLACE_NAMES[0] or s.prompt.size is not None]
    made: dict[str, list[Image.Image]] = {"with ControlNet": [], "without": [], "true latents": []}
    for scene in tqdm(scenes, desc="canny"):
        plain = Request(scene.quiet, seed=scene.prompt.seed)
        guided = replace(plain, controls=(controls.Control("canny", scene.image),))
        made["with ControlNet"].append(generate(guided))
        made["without"].append(generate(plain))
        made["true latents"].append(reconstruct(scene.image))
    scores = {}
    for column, pictures in made.items():
        agreement = [edge_f1(edges_of(p), edges_of(s.image), TOLERANCE) for p, s in zip(pictures, scenes, strict=True)]
        scores[column] = {"edges": _mean(agreement)}
    return Outcome(scores, {f"canny {column}": pictures for column, pictures in made.items()})


def evaluate_images(cascade: Cascade, judge: Judge, scenes: Sequence[Scene]) -> Iterator[tuple[str, Outcome]]:
    """Every use of images that a model has the networks for, with a line that says what its scores are."""

    def generate(request: Request) -> Image.Image:
        (picture,) = cascade.generate(request)
        return picture

    count = f"{len(scenes)} scenes"
    yield f"Variation: {count} as image prompts, with an empty prompt.", variation(generate, judge, scenes)
    yield (
        f"Image-to-image: {count} at each prompt_strength, with prompts that say neither place, size nor style; similarity to "
        "the scene is SSIM.",
        image_to_image(generate, judge, scenes),
    )
    yield (
        f"Inpainting: {count} masked where their object is, with prompts that name another; changed outside: pictures of "
        "which any pixel outside of the mask is not the scene's.",
        inpainting(generate, judge, scenes),
    )
    yield f"Reconstruction: {count}, with an empty prompt.", reconstruction(cascade.reconstruct, judge, scenes)
    if "canny" not in cascade.controlnets:
        logger.warning("This model has no controlnet_canny: how well pictures follow edges is left out.")
        return
    outcome = canny(generate, cascade.reconstruct, scenes)
    yield (
        f"Canny: {len(outcome.pictures['canny without'])} of them, not in the middle or not of the usual size, with prompts that "
        f"say neither place, size nor style; edges: F1 against the scene's, with {TOLERANCE} pixels' tolerance.",
        outcome,
    )


def _objects(judge: Judge, pictures: Sequence[Image.Image], names: Sequence[str]) -> dict[str, float]:
    ranks = [
        judge.ranked(to_pixels(picture)[0].to(judge.device))[0].index(name)
        for picture, name in zip(pictures, names, strict=True)
    ]
    return {f"object {label}": _mean([rank < most for rank in ranks]) for label, most in (("first", 1), ("in 5", 5))}


def _names(scenes: Sequence[Scene]) -> list[str]:
    return [scene.prompt.objects[0] for scene in scenes]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
