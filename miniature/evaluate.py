"""How good is a miniature? The fixed prompts, the scores of pictures made for them, and the scores stage by stage.

Anything that makes pictures of prompts can be judged: `evaluate` takes a function. `stage_pictures` makes the pictures that
show which stage of a Cascade loses quality.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade import sizes
from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.sampling import Noise, finish
from cascade.stages.decoder import decoder_steps
from cascade.stages.encoder import encode_pixels
from cascade.stages.pixels import decode_pixels
from cascade.stages.prior import prior_steps
from miniature.captions import Captioner
from miniature.judge import Judge, background_colours
from miniature.scenes import (
    COLOUR_NAMES,
    GRADIENT_WAYS,
    PLACE_NAMES,
    RELATIONS,
    SIZE_NAMES,
    Plans,
    Split,
    sample_plans,
)

PROMPTS = Path(__file__).parent / "prompts.json"


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show.

    Attributes:
        text, seed: what the model is given.
        objects: one name, or two in the order in which `relation` names them.
        style, relation, size: words of `scenes`; None where nothing is said (one object has no relation).
        colours: the background's start and end, the same for a plain one; None where nothing is said.
        gradient_way: of `GRADIENT_WAYS`, None for a plain background.
        place: of `PLACE_NAMES`.
        unseen: whether this object on this background, or these two objects together, never occur in training.
    """

    text: str
    seed: int
    objects: tuple[str, ...]
    style: str | None
    relation: str | None
    size: str | None
    place: str
    colours: tuple[str, str] | None
    gradient_way: str | None
    unseen: bool


def make_prompts(
    names: Sequence[str], styles: Sequence[str], seed: int, one: int = 500, two: int = 100
) -> list[Prompt]:
    """`one` one-object and `two` two-object prompts, half of either unseen in training; seeds count up from `seed`."""
    captioner, rng = Captioner(names, styles), random.Random(seed)
    prompts: list[Prompt] = []
    splits: tuple[Split, Split] = ("train", "heldout")
    for wants_two, count in ((False, one), (True, two)):
        for split in splits:
            plans = sample_plans(6 * count, names, seed + len(prompts), split, len(styles))
            plans = plans[(plans.objects[:, 1] >= 0) == wants_two][: count // 2]
            for i, text in enumerate(captioner.captions(plans, rng)):
                prompts.append(_prompt(text, seed + len(prompts), plans, i, names, styles, split == "heldout"))
    return prompts


def _prompt(
    text: str, seed: int, plans: Plans, i: int, names: Sequence[str], styles: Sequence[str], unseen: bool
) -> Prompt:
    start, end = plans.colours[i]
    says_background = bool(plans.says_background[i])
    relation, size = plans.relations[i], plans.size_names[i]
    return Prompt(
        text=text,
        seed=seed,
        objects=tuple(names[index] for index in plans.objects[i] if index >= 0),
        style=styles[plans.styles[i, 0]] if plans.says_style[i] else None,
        relation=RELATIONS[relation] if relation >= 0 else None,
        size=SIZE_NAMES[size] if size >= 0 else None,
        place=PLACE_NAMES[plans.places[i]],
        colours=(COLOUR_NAMES[start], COLOUR_NAMES[end]) if says_background else None,
        gradient_way=GRADIENT_WAYS[plans.gradient_ways[i]] if says_background and start != end else None,
        unseen=unseen,
    )


def plans_of(prompts: Sequence[Prompt], names: Sequence[str], styles: Sequence[str]) -> Plans:
    """The true scenes of prompts, in the first style where none is said."""
    index = {name: i for i, name in enumerate(names)}
    colours = [p.colours or ("white", "white") for p in prompts]
    return Plans.of(
        objects=np.array([[index[name] for name in p.objects] + [-1] * (2 - len(p.objects)) for p in prompts]),
        styles=np.array([[styles.index(p.style) if p.style else 0] * 2 for p in prompts]),
        colours=np.array([[COLOUR_NAMES.index(name) for name in pair] for pair in colours]),
        gradient_ways=np.array([GRADIENT_WAYS.index(p.gradient_way) if p.gradient_way else 0 for p in prompts]),
        relations=np.array([RELATIONS.index(p.relation) if p.relation else -1 for p in prompts]),
        places=np.array([PLACE_NAMES.index(p.place) for p in prompts]),
        size_names=np.array([SIZE_NAMES.index(p.size) if p.size else -1 for p in prompts]),
        says_style=np.array([p.style is not None for p in prompts]),
        says_background=np.array([p.colours is not None for p in prompts]),
    )


def save_prompts(prompts: Sequence[Prompt], path: Path = PROMPTS) -> None:
    """Write prompts as JSON, one a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(asdict(prompt)) for prompt in prompts) + "\n]\n")


def load_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """Read prompts that `save_prompts` wrote."""
    rows = json.loads(path.read_text())
    pairs = ("objects", "colours")
    return [Prompt(**{key: tuple(v) if key in pairs and v else v for key, v in row.items()}) for row in rows]


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one picture: every object's rank among all names (0: nearest), the background right or not.

    `background` is None where the prompt says nothing of it.
    """

    prompt: Prompt
    ranks: tuple[int, ...]
    background: bool | None

    def found(self, nearest: int) -> bool:
        """Whether every object is among the `nearest` names."""
        return all(rank < nearest for rank in self.ranks)


def judge_picture(judge: Judge, picture: Tensor, prompt: Prompt) -> Verdict:
    """Judge one picture, float (3, S, S) in 0..1. All styles count where the prompt says none."""
    rankings = judge.ranked(picture, prompt.style, prompt.relation)
    ranks = tuple(ranking.index(name) for ranking, name in zip(rankings, prompt.objects, strict=True))
    background = None
    if prompt.colours:
        background = background_colours(picture[None], prompt.gradient_way)[0] == prompt.colours
    return Verdict(prompt, ranks, background)


def evaluate(
    generate: Callable[[list[str], list[int]], list[Image.Image]],
    judge: Judge,
    prompts: Sequence[Prompt],
    device: torch.device | str = "cpu",
    batch_size: int = 50,
) -> tuple[list[Verdict], list[Image.Image]]:
    """Make a picture of every prompt, with `generate(texts, seeds)`, and judge it.

    Returns:
        One verdict and one picture a prompt, in their order.
    """
    verdicts, pictures = [], []
    for first in tqdm(range(0, len(prompts), batch_size), desc="evaluate", unit="batch"):
        batch = prompts[first : first + batch_size]
        made = generate([prompt.text for prompt in batch], [prompt.seed for prompt in batch])
        for prompt, picture in zip(batch, made, strict=True):
            verdicts.append(judge_picture(judge, to_pixels(picture)[0].to(device), prompt))
        pictures += made
    return verdicts, pictures


def summarise(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The scores by name, each a share in 0..1; scores that no verdict bears on are left out."""
    single = [verdict for verdict in verdicts if len(verdict.ranks) == 1]
    double = [verdict for verdict in verdicts if len(verdict.ranks) == 2]
    backgrounds = [verdict for verdict in single if verdict.background is not None]
    rows: dict[str, list[bool]] = {}
    for label, chosen in (("", single), (", seen", _seen(single)), (", unseen", _unseen(single))):
        rows[f"object first{label}"] = [verdict.found(1) for verdict in chosen]
        rows[f"object in 5{label}"] = [verdict.found(5) for verdict in chosen]
    for label, chosen in (("", backgrounds), (", seen", _seen(backgrounds)), (", unseen", _unseen(backgrounds))):
        rows[f"background{label}"] = [bool(verdict.background) for verdict in chosen]
    for label, chosen in (("", double), (", seen", _seen(double)), (", unseen", _unseen(double))):
        rows[f"both objects first{label}"] = [verdict.found(1) for verdict in chosen]
        rows[f"both objects in 5{label}"] = [verdict.found(5) for verdict in chosen]
    return {name: sum(hits) / len(hits) for name, hits in rows.items() if hits}


def _seen(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if not verdict.prompt.unseen]


def _unseen(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.prompt.unseen]


def table(columns: dict[str, dict[str, float]]) -> str:
    """Scores as a Markdown table: a row a score, a column a kind of picture, in percent."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    head = ["| score | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    cells = ([f"{100 * scores[name]:.1f} %" if name in scores else "" for scores in columns.values()] for name in names)
    return "\n".join(head + [f"| {name} | " + " | ".join(row) + " |" for name, row in zip(names, cells, strict=True)])


def doubt(count: int, what: str) -> str:
    """A sentence about scores of fewer than 200 judged pictures; empty for more.

    Args:
        count: of pictures.
        what: they are made from.
    """
    if count >= 200:
        return ""
    # 1.96 deviations of a share's mean, at most, where the share is a half.
    points = 98 / max(1, count) ** 0.5
    return f"{count} {what}: a score of so few can be off by up to {points:.0f} percentage points (95 % confidence)."


def generate_batch(
    cascade: Cascade, texts: list[str], seeds: list[int], guidance: float | None = None
) -> list[Image.Image]:
    """Square pictures of native size, as `Cascade.generate` makes each of them, but of several prompts at once.

    `guidance` is Stage C's; None: the model's own.
    """
    size = cascade.native_size
    text = cascade.text.encode(texts)
    negative = cascade.text.encode([""])
    noise = Noise(seeds, cascade.device)
    prior = cascade.defaults["prior"]
    if guidance is not None:
        prior = replace(prior, guidance=guidance)
    semantic = finish(
        prior_steps(
            cascade.prior,
            text,
            negative,
            size=sizes.semantic_size(size, size),
            noise=noise,
            **vars(prior),
        )
    )
    return [to_image(pixels) for pixels in _paint(cascade, semantic, texts, noise)]


def _paint(cascade: Cascade, semantic: Tensor, texts: list[str], noise: Noise) -> Iterator[Tensor]:
    """Stages B and A: pictures (3, S, S) of native size from semantic latents."""
    latents = finish(
        decoder_steps(
            cascade.decoder,
            semantic,
            cascade.text.encode(texts).pooled,
            cascade.text.encode([""]).pooled,
            size=sizes.decoder_size(cascade.native_size, cascade.native_size),
            noise=noise,
            **vars(cascade.defaults["decoder"]),
        )
    )
    return decode_pixels(cascade.vqgan, latents, cascade.stage_a_scale)


def stage_pictures(
    cascade: Cascade, scenes: Tensor, texts: list[str], seeds: list[int]
) -> dict[str, list[Image.Image]]:
    """What is left of true scenes, float (n, 3, S, S) in 0..1 of native size, after "A" alone, and after "B + A".

    The latter paints from the scenes' own semantic latents.
    """
    with torch.no_grad():
        latents = cascade.vqgan.encode(scenes.to(cascade.device, cascade.vqgan.dtype))
    semantic = encode_pixels(cascade.effnet, scenes.to(cascade.device))
    return {
        "A": [to_image(pixels) for pixels in decode_pixels(cascade.vqgan, latents)],
        "B + A": [to_image(pixels) for pixels in _paint(cascade, semantic, texts, Noise(seeds, cascade.device))],
    }


def sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """One picture of many, equally large, row by row."""
    width, height = pictures[0].size
    page = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (i % columns * width, i // columns * height))
    return page
