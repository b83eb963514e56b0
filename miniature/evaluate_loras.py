"""How good are the miniature's LoRAs? Pictures of prompts with them, judged against drawings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade import Cascade, Lora, Request
from cascade.images.tensors import to_pixels
from miniature.icons import STYLES
from miniature.judge import Judge
from miniature.loras import STYLE, WORD, captions_of, style_plans, subject_drawing, subject_plans
from miniature.prompts import make_prompts
from miniature.scores import Values

# A LoRA's file in the folder of the model.
STYLE_FILE, SUBJECT_FILE = "ink.safetensors", "pim.safetensors"


def pictures_of(cascade: Cascade, prompts: Sequence[str], seed: int, lora: Path | None) -> list[Image.Image]:
    """A picture of each prompt; picture i has the seed ``seed + i``."""
    loras = () if lora is None else (Lora(lora),)
    requests = [Request(prompt, seed=seed + place, loras=loras) for place, prompt in enumerate(prompts)]
    with tqdm(total=len(requests), desc=lora.stem if lora else "without") as bar:
        made = cascade.batch(requests, lambda progress: bar.update(progress.image is not None) and None)
        return [picture for (picture,) in made]


def judge_style(
    cascade: Cascade, lora: Path, drawings: Tensor, inks: Tensor, names: list[str], seed: int, count: int = 100
) -> Values:
    """``count`` prompts of one object in the new style, half of them of objects that it was never trained with.

    Args:
        drawings: of the three styles that the miniature knows, see `icons.load_drawings`.
        inks: of the new one, uint8 (objects, 4, s, s).

    Returns:
        ``style first``: of the object's four drawings, the one in the new style is nearest; ``object first``: of all
        drawings in the new style, the object's is nearest. Each also for trained and untrained objects alone.
    """
    styles = [*_known(len(drawings), len(names)), STYLE.style]
    both = torch.cat([drawings.unflatten(0, (len(names), -1)), inks[:, None]], 1).flatten(0, 1)
    judge = Judge(both.to(cascade.device), names, styles)
    values: Values = {}
    for label, trained in (("trained", True), ("untrained", False)):
        plans = style_plans(names, count // 2, seed, trained=trained)
        made = pictures_of(cascade, captions_of(plans, names, seed), seed, lora)
        for picture, index in zip(made, plans.objects[:, 0].tolist(), strict=True):
            pixels = to_pixels(picture, judge.device)[0]
            distances = torch.stack([judge.distances(pixels, style)[0] for style in styles])
            found = {
                "style first": int(distances[:, index].argmin()) == len(styles) - 1,
                "object first": int(distances[-1].argmin()) == index,
            }
            for score, right in found.items():
                for name in (score, f"{score}, {label}"):
                    values.setdefault(name, []).append(float(right))
    return values


def judge_subject(
    cascade: Cascade,
    lora: Path,
    drawings: Tensor,
    names: list[str],
    seed: int,
    count: int = 60,
    more: int = 200,
) -> tuple[Values, dict[str, Values]]:
    """``count`` prompts of the subject on new backgrounds; ``more`` of other objects, with the LoRA and without.

    Returns:
        ``subject first``: the subject's drawing is the nearest of all. And ``object first`` of the other objects, by
        "with" and "without".
    """
    styles = list(_known(len(drawings), len(names)))
    subject = subject_drawing().expand(len(styles), -1, -1, -1)
    judge = Judge(torch.cat([drawings, subject]).to(cascade.device), [*names, WORD], styles)
    plans = subject_plans(count, seed, new=True)
    made = pictures_of(cascade, captions_of(plans, [WORD], seed), seed, lora)
    first = [judge.ranked(to_pixels(one, judge.device)[0])[0][0] == WORD for one in made]
    others = {}
    prompts = [one for one in make_prompts(names, styles, seed, 2 * more) if len(one.objects) == 1][:more]
    for label, used in (("without", None), ("with", lora)):
        pictures = pictures_of(cascade, [one.text for one in prompts], seed, used)
        right = [
            judge.ranked(to_pixels(picture, judge.device)[0], one.style)[0][0] == one.objects[0]
            for picture, one in zip(pictures, prompts, strict=True)
        ]
        others[label] = {"object first": [float(one) for one in right]}
    return {"subject first": [float(one) for one in first]}, others


def _known(drawings: int, names: int) -> tuple[str, ...]:
    return STYLES[: drawings // names]
