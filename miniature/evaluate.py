"""How good is a miniature? Its pictures of test prompts, by stage, judged against the drawings.

`pictures_by_stage` has the engine make the pictures; `score_pictures` judges them. The difference between two
columns is what one stage loses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.images.tensors import to_pixels
from cascade.pipeline import Cascade
from cascade.progress import Progress
from cascade.request import Request
from miniature.judge import Judge, background_colours
from miniature.prompts import Prompt
from miniature.scores import Values
from miniature.stage_a import encode_and_decode
from training.pictures import psnr

Pictures = dict[str, list[Image.Image]]
"""Pictures by what made them, one a prompt."""


@dataclass(frozen=True)
class Verdict:
    """The judge's result for one picture.

    Attributes:
        prompt: what the picture was made for.
        ranks: of every object, its place among all names; 0 is the nearest.
        background: whether it is right; None if the prompt names none.
    """

    prompt: Prompt
    ranks: tuple[int, ...]
    background: bool | None

    def found(self, nearest: int) -> bool:
        """Whether every object is among the ``nearest`` names."""
        return all(rank < nearest for rank in self.ranks)


def judge_picture(judge: Judge, picture: Tensor, prompt: Prompt) -> Verdict:
    """Judges one picture, float32 (3, S, S) in 0..1. Objects may be in any style if the prompt names none."""
    rankings = judge.ranked(picture, prompt.style, prompt.relation)
    ranks = tuple(ranking.index(name) for ranking, name in zip(rankings, prompt.objects, strict=True))
    background = None
    if prompt.colours:
        background = background_colours(picture[None], prompt.gradient_way)[0] == prompt.colours
    return Verdict(prompt, ranks, background)


def judge_pictures(judge: Judge, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Verdict]:
    """A verdict on each picture, which was made for the prompt at the same place."""
    return [
        judge_picture(judge, to_pixels(picture, judge.device)[0], prompt)
        for picture, prompt in zip(pictures, prompts, strict=True)
    ]


def score_verdicts(verdicts: Sequence[Verdict]) -> Values:
    """Each verdict's value of each score, 1 for right; scores without any value are left out."""
    rows: dict[str, list[bool]] = {}
    for kind, objects in (("object", 1), ("both objects", 2)):
        for label, chosen in _splits([verdict for verdict in verdicts if len(verdict.ranks) == objects]):
            rows[f"{kind} first{label}"] = [verdict.found(1) for verdict in chosen]
            rows[f"{kind} in 5{label}"] = [verdict.found(5) for verdict in chosen]
        if objects == 1:
            backgrounds = [v for v in verdicts if len(v.ranks) == 1 and v.background is not None]
            for label, chosen in _splits(backgrounds):
                rows[f"background{label}"] = [bool(verdict.background) for verdict in chosen]
    return {name: [float(hit) for hit in hits] for name, hits in rows.items() if hits}


def _splits(verdicts: list[Verdict]) -> list[tuple[str, list[Verdict]]]:
    """All verdicts, those on combinations that training shows, and those on combinations that it never shows."""
    return [
        ("", verdicts),
        (", seen", [verdict for verdict in verdicts if not verdict.prompt.unseen]),
        (", unseen", [verdict for verdict in verdicts if verdict.prompt.unseen]),
    ]


def text_to_pictures(cascade: Cascade, prompts: Sequence[Prompt], **settings: Any) -> list[Image.Image]:
    """A picture of each prompt, of native size; ``settings`` are further attributes of the `Request`."""
    requests = [Request(prompt.text, seed=prompt.seed, **settings) for prompt in prompts]
    with tqdm(total=len(requests), desc="text to pictures") as bar:

        def count(progress: Progress) -> None:
            bar.update(progress.image is not None)

        return [picture for (picture,) in cascade.batch(requests, count)]


def pictures_by_stage(cascade: Cascade, scenes: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Pictures:
    """The true scenes of prompts; these after Stage A, and after Stages B and A; and pictures of the prompts themselves.

    Stages B and A paint from the scenes' own semantic latents.
    """
    painted = tqdm(zip(scenes, prompts, strict=True), desc="B + A", total=len(prompts))
    return {
        "scenes": list(scenes),
        "A": [encode_and_decode(cascade, scene) for scene in scenes],
        "B + A": [cascade.reconstruct(scene, prompt.seed, prompt.text) for scene, prompt in painted],
        "C + B + A": text_to_pictures(cascade, prompts),
    }


def score_pictures(
    judge: Judge, pictures: Sequence[Image.Image], scenes: Sequence[Image.Image], prompts: Sequence[Prompt]
) -> tuple[Values, list[Verdict]]:
    """All scores of pictures made for prompts, and the verdicts.

    ``sharpness`` is each picture's gradient over that of the prompt's true scene, for prompts that name a style: others
    allow drawings of three styles, which differ in sharpness.
    """
    verdicts = judge_pictures(judge, pictures, prompts)
    ratios = [
        gradient(to_pixels(picture)) / gradient(to_pixels(scene))
        for picture, scene, prompt in zip(pictures, scenes, prompts, strict=True)
        if prompt.style is not None
    ]
    return score_verdicts(verdicts) | ({"sharpness": ratios} if ratios else {}), verdicts


def gradient(pixels: Tensor) -> float:
    """Root mean square difference of neighbouring pixels of a picture (1, 3, H, W) in 0..1, down and across."""
    down, across = pixels.diff(dim=-2).square().mean(), pixels.diff(dim=-1).square().mean()
    return (down + across).sqrt().item()


def fidelity(made: Pictures, prompts: Sequence[Prompt]) -> Values:
    """PSNR in dB of what Stage A, and Stages B and A, leave of scenes with combinations that training never shows."""
    unseen = [index for index, prompt in enumerate(prompts) if prompt.unseen]
    return {
        stage: [psnr(to_pixels(made[stage][index]), to_pixels(made["scenes"][index])) for index in unseen]
        for stage in ("A", "B + A")
    }
