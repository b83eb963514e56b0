"""The training data of the miniature: scenes, composed when they are asked for, with tokenised captions.

Until `Scenes.images` composes its pixels on the training device, a scene is a plan of a few numbers, so many different scenes
take little memory.
"""

import random
import zipfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cascade.sizes import Size
from miniature.captions import Captioner, article
from miniature.compose import compose
from miniature.icons import load_drawings, load_names, load_objects
from miniature.scenes import Plans, Split, elsewhere, sample_plans, with_other_objects
from training.dataset import Dataset
from training.errors import TrainingError
from training.values import Count, Share

CAPTIONS_FOR_TOKENIZER = 100_000


def captioner(names: list[str], styles: list[str]) -> Captioner:
    """The captioner for drawings of ``names`` in ``styles``, with the further names in the object list."""
    return Captioner(names, styles, {item.name: item.also for item in load_objects()})


def say_less(plans: Plans, share: float, seed: int) -> Plans:
    """Plans of which a random ``share`` name neither place, size nor style in their captions; the scenes stay the same."""
    silent = np.random.default_rng(seed).random(len(plans)) < share
    return replace(
        plans,
        places=np.where(silent, 0, plans.places),
        size_names=np.where(silent, -1, plans.size_names),
        says_style=plans.says_style & ~silent,
    )


class Scenes(Dataset):
    """``count`` scenes of one split.

    Args:
        drawings, names, styles: from `icons.load_drawings`.
        count: number of scenes.
        tokenizer, size, device: as `Dataset` has them.
        seed: decides all scenes and captions.
        split: ``train``, or ``heldout`` for combinations that training never shows.
        unsaid: share of the scenes whose captions name neither place, size nor style, even if these are not the defaults.
        nameless: share of the scenes whose captions name the background alone.
        others: share of the scenes whose reference image shows another object in the same style. Their captions name the object.
    """

    def __init__(
        self,
        drawings: Tensor,
        names: list[str],
        styles: list[str],
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        size: Size,
        seed: int,
        split: Split,
        device: torch.device,
        unsaid: float = 0.0,
        nameless: float = 0.0,
        others: float = 0.0,
    ) -> None:
        self.drawings, self.objects, self.styles = drawings.to(device), names, styles
        self.seed, self.unsaid, self.nameless, self.others = seed, unsaid, nameless, others
        self.plans = sample_plans(count, names, seed, split, len(styles))
        self.draws = np.random.default_rng((seed, 1)).random(count)
        self.other = self.draws < others
        super().__init__(self._write_captions, tokenizer, size, device, [article(name) for name in names])

    def __len__(self) -> int:
        return len(self.plans)

    def _write_captions(self) -> list[str]:
        words = captioner(self.objects, self.styles)
        captions = words.captions(say_less(self.plans, self.unsaid, self.seed), random.Random(self.seed))
        if self.nameless:
            silent = ~self.other & (self.draws < self.others + self.nameless)
            backgrounds = words.backgrounds(self.plans, random.Random(self.seed + 1))
            captions = [b if quiet else a for a, b, quiet in zip(captions, backgrounds, silent.tolist(), strict=True)]
        return captions

    @cached_property
    def reference_plans(self) -> Plans:
        """The plans of the reference images."""
        referred = with_other_objects(self.plans, self.other, len(self.objects), self.seed + 1)
        return elsewhere(referred, self.objects, self.seed + 2)

    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        return compose(self.drawings, self.plans[indices.numpy()], len(self.styles), size or self.size)

    def references(self, indices: Tensor) -> Tensor:
        """The same objects in the same styles, or for a share of the scenes other objects, in other scenes."""
        return compose(self.drawings, self.reference_plans[indices.numpy()], len(self.styles), self.size)

    def same_subject(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(~self.other[indices.numpy()])

    def shown(self, indices: Tensor) -> Tensor:
        objects = torch.from_numpy(self.plans.objects[indices.numpy()]).to(self.device, torch.int64)
        shown = torch.zeros(len(indices), len(self.names) + 1, dtype=torch.bool, device=self.device)
        return shown.scatter_(1, objects % shown.shape[1], True)[:, :-1]  # -1, no object, becomes the last column


class Drawings:
    """Scenes of the packed drawings, as a `training.sources.Source`.

    Args:
        path: the file that ``scripts/build-mini-data`` writes.
        scenes: number of training scenes.
        unseen: number of held-out ones.
        seed, unsaid, nameless, others: as `Scenes` has them.
    """

    def __init__(
        self,
        path: Path,
        *,
        scenes: Count,
        unseen: Count,
        seed: int,
        unsaid: Share = 0.0,
        nameless: Share = 0.0,
        others: Share = 0.0,
    ) -> None:
        self.path, self.seed = path, seed
        self.shares = {"unsaid": unsaid, "nameless": nameless, "others": others}
        self.counts: dict[Split, int] = {"train": scenes, "heldout": unseen}
        self._drawn: tuple[Tensor, list[str], list[str]] | None = None

    def check(self, record: Path) -> None:
        """Checks that the file is a zip file; notes nothing in ``record``."""
        if not zipfile.is_zipfile(self.path):
            raise TrainingError(f"{self.path} is not a zip file of drawings; scripts/build-mini-data makes one.")

    def captions(self) -> list[str]:
        """Captions of training scenes."""
        names, styles = load_names(self.path)
        plans = sample_plans(CAPTIONS_FOR_TOKENIZER, names, self.seed)
        return captioner(names, styles).captions(plans, random.Random(self.seed))

    def dataset(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, size: Size, device: torch.device) -> Scenes:
        if self._drawn is None:
            drawings, names, styles = load_drawings(self.path)
            self._drawn = drawings.to(device), names, styles
        options = {"seed": self.seed, "size": size, "device": device, **self.shares}
        return Scenes(*self._drawn, self.counts[split], tokenizer, split=split, **options)
