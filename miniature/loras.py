"""The training data of the miniature's two LoRAs: a style and a subject that the miniature never saw.

The style is that of a fourth icon set: black drawings of the same objects. The subject is one drawing, made for this repository,
with a word of its own. Both become zips of pictures with captions beside them, for `scripts/train-lora`.
"""

import io
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cascade.images.tensors import to_image
from miniature.captions import Captioner
from miniature.compose import compose
from miniature.icons import IconSet, render_drawing
from miniature.scenes import COLOUR_NAMES, SIZE_NAMES, Plans, sample_plans
from training.files import whole_file

STYLE = IconSet("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "ink", "MIT", "Microsoft")
WORD = "[pim]"
SUBJECT = Path(__file__).parent / "subject.svg"
SIDE = 256
# One object in five is never trained in the new style.
UNTRAINED = 5
# Black drawings are not seen on these.
DARK = ("black", "dark blue", "dark green")
# The subject is never trained on these.
NEW_BACKGROUNDS = ("turquoise", "dark green", "purple", "beige", "gray", "orange")


def subject_drawing() -> Tensor:
    """The subject, as `icons.load_drawings` has objects: uint8 (1, 4, 192, 192), premultiplied."""
    drawing = render_drawing(SUBJECT.read_text(encoding="utf-8")).convert("RGBa")
    return torch.from_numpy(np.asarray(drawing).transpose(2, 0, 1).copy())[None]


def is_trained(plans: Plans) -> np.ndarray:
    """bool (n,): whether a style's training has a plan's object."""
    return plans.objects[:, 0] % UNTRAINED != 0


def style_plans(names: list[str], count: int, seed: int, *, trained: bool) -> Plans:
    """Scenes of one object each, in the new style, which their captions name, on backgrounds that are not dark."""
    plans = sample_plans(20 * count + 100, names, seed, "train", 1)
    light = ~np.isin(plans.colours, [COLOUR_NAMES.index(name) for name in DARK]).any(1)
    plans = plans[(plans.objects[:, 1] < 0) & light & (is_trained(plans) == trained)][:count]
    return replace(plans, says_style=np.ones(len(plans), bool))


def subject_plans(count: int, seed: int, *, new: bool, balanced: bool = False) -> Plans:
    """Scenes of the subject, on the backgrounds of training or on `NEW_BACKGROUNDS`, which their captions name.

    balanced: half of them are small or at a named place; as scenes are drawn, a third is.
    """
    plans = sample_plans(60 * count + 400, [WORD], seed, "train", 1)
    colours = np.isin(plans.colours, [COLOUR_NAMES.index(name) for name in NEW_BACKGROUNDS])
    wanted = colours.all(1) if new else ~colours.any(1)
    plans = plans[(plans.objects[:, 1] < 0) & wanted & plans.says_background]
    if balanced:
        small = (plans.places > 0) | (plans.size_names == SIZE_NAMES.index("small"))
        half = [rows[: (count + i) // 2] for i, rows in enumerate((small.nonzero()[0], (~small).nonzero()[0]))]
        plans = plans[np.sort(np.concatenate(half))]
    plans = plans[:count]
    return replace(plans, says_style=np.zeros(len(plans), bool))


def write_pictures(path: Path, drawings: Tensor, plans: Plans, captions: list[str]) -> None:
    """A zip of pictures with their captions; it appears when it is complete.

    drawings: uint8 (objects, 4, s, s), of one style.
    """
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        for index, caption in enumerate(captions):
            (scene,) = compose(drawings, plans[index : index + 1], 1, (SIDE, SIDE))
            content = io.BytesIO()
            to_image(scene).save(content, "PNG")
            archive.writestr(f"{index:04d}.png", content.getvalue())
            archive.writestr(f"{index:04d}.txt", caption)


def captions_of(plans: Plans, names: list[str], seed: int) -> list[str]:
    """Captions of the scenes of one style."""
    return Captioner(names, [STYLE.style]).captions(plans, random.Random(seed))


def write_style(path: Path, drawings: Tensor, names: list[str], count: int = 2000, seed: int = 1) -> None:
    """The style's training pictures."""
    plans = style_plans(names, count, seed, trained=True)
    write_pictures(path, drawings, plans, captions_of(plans, names, seed))


def write_subject(path: Path, count: int = 24, seed: int = 1) -> None:
    """The subject's training pictures."""
    # With one picture in twelve that is small or at a named place, the word was learned only for the other cases.
    plans = subject_plans(count, seed, new=False, balanced=True)
    write_pictures(path, subject_drawing(), plans, captions_of(plans, [WORD], seed))
