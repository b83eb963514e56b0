"""The training data of the miniature as tensors: scenes drawn when they are asked for, with tokenised captions.

A scene is a plan of a few numbers until :meth:`Scenes.images` composes its pixels on the training device, so any number of
different scenes costs next to nothing to keep.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from training.data.captions import Captioner
from training.data.compose import compose
from training.data.icons import load_drawings, load_objects
from training.data.scenes import Split, sample_plans


def captioner(names: list[str], styles: list[str]) -> Captioner:
    """The captioner for drawings of ``names`` in ``styles``, with the other names that the object list knows."""
    return Captioner(names, styles, {item.name: item.also for item in load_objects()})


def training_captions(data: Path, count: int, *, seed: int) -> list[str]:
    """``count`` captions of training scenes, for the tokenizer to learn from."""
    _, names, styles = load_drawings(data)
    return captioner(names, styles).captions(sample_plans(count, names, seed), random.Random(seed))


class Scenes:
    """``count`` scenes of one split.

    Args:
        data: the packed drawings that ``scripts/build-mini-data`` writes.
        count: number of scenes.
        tokenizer: CLIP tokenizer for the captions.
        size: pixels a side.
        seed: decides every scene and every caption.
        split: ``train``, or ``heldout`` for combinations that training never shows.
        device: where pixels and tokens live.
    """

    def __init__(
        self,
        data: Path,
        count: int,
        tokenizer: PreTrainedTokenizerBase,
        *,
        size: int,
        seed: int,
        split: Split,
        device: torch.device,
    ) -> None:
        drawings, names, styles = load_drawings(data)
        self.drawings, self.styles, self.size, self.device = drawings.to(device), styles, size, device
        self.plans = sample_plans(count, names, seed, split, len(styles))
        self.captions = captioner(names, styles).captions(self.plans, random.Random(seed))
        self._tokens, self._mask = (value.to(device) for value in _tokenise(tokenizer, self.captions))
        self._empty = tuple(value.to(device) for value in _tokenise(tokenizer, [""]))

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) of random scenes, on the CPU so that composing them waits for nothing on the device."""
        own = torch.Generator().manual_seed(generator.initial_seed())
        return torch.randint(len(self), (count,), generator=own)

    def images(self, indices: Tensor, size: int | None = None) -> Tensor:
        """Pixels (len(indices), 3, size, size), float32 in 0..1."""
        return compose(self.drawings, self.plans[indices.numpy()], len(self.styles), size or self.size)

    def tokens(self, indices: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 (len(indices), 77); the empty caption where ``keep`` (boolean) is false."""
        indices = indices.to(self.device)
        tokens, mask = self._tokens[indices].long(), self._mask[indices].long()
        if keep is None:
            return tokens, mask
        empty_tokens, empty_mask = self._empty
        keep = keep[:, None]
        return torch.where(keep, tokens, empty_tokens.long()), torch.where(keep, mask, empty_mask.long())

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 (count, 77), of the empty caption."""
        tokens, mask = self._empty
        return tokens.long().expand(count, -1), mask.long().expand(count, -1)


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids as int32 and attention mask as int8, each (len(texts), 77)."""
    encoded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return (
        torch.from_numpy(np.asarray(encoded["input_ids"], np.int32)),
        torch.from_numpy(np.asarray(encoded["attention_mask"], np.int8)),
    )
