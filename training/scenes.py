"""The training data of the miniature as tensors: scenes drawn when they are asked for, with tokenised captions.

A scene is a plan of a few numbers until :meth:`Scenes.images` composes its pixels on the training device, so any number of
different scenes costs next to nothing to keep.
"""

import random
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cascade.sizes import Size
from training.data.captions import Captioner
from training.data.compose import compose
from training.data.icons import load_drawings, load_objects
from training.data.scenes import Split, sample_plans
from training.dataset import Dataset


def captioner(names: list[str], styles: list[str]) -> Captioner:
    """The captioner for drawings of ``names`` in ``styles``, with the other names that the object list knows."""
    return Captioner(names, styles, {item.name: item.also for item in load_objects()})


def scene_captions(data: Path, count: int, *, seed: int) -> list[str]:
    """``count`` captions of training scenes, for the tokenizer to learn from."""
    _, names, styles = load_drawings(data)
    return captioner(names, styles).captions(sample_plans(count, names, seed), random.Random(seed))


class Scenes(Dataset):
    """``count`` scenes of one split.

    Args:
        data: the packed drawings that ``scripts/build-mini-data`` writes.
        count: number of scenes.
        tokenizer, size, device: as :class:`Dataset` has them.
        seed: decides every scene and every caption.
        split: ``train``, or ``heldout`` for combinations that training never shows.
    """

    def __init__(
        self,
        data: Path,
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        size: Size,
        seed: int,
        split: Split,
        device: torch.device,
    ) -> None:
        drawings, names, self.styles = load_drawings(data)
        self.drawings = drawings.to(device)
        self.plans = sample_plans(count, names, seed, split, len(self.styles))
        super().__init__(
            captioner(names, self.styles).captions(self.plans, random.Random(seed)), tokenizer, size, device
        )

    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        return compose(self.drawings, self.plans[indices.numpy()], len(self.styles), size or self.size)
