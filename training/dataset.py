"""Captioned pictures, the interface of all training data. `picture_folder.PictureFolder` reads them from files."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from cascade.sizes import Size

Split = Literal["train", "heldout"]
"""``train`` is trained on; ``heldout`` is for evaluation."""

LEAST_PART = 0.6
"""Of a picture's sides, the least that a reference image shows."""
FEW_TIMES = 64
"""Draws are made distinct if there are at most this many times as many pictures; otherwise repetitions are rare."""


class Dataset(ABC):
    """Captioned pictures by index, at any size.

    Args:
        captions: one for each picture; or a function that returns them, called once, when they are first needed. ``__len__``
            needs them, unless a subclass overrides it.
        tokenizer: CLIP tokenizer for the captions.
        size: default height and width of the pictures in pixels.
        device: where pixels and tokens are kept.
        names: short captions of all things that pictures can show; empty if unknown.
    """

    def __init__(
        self,
        captions: list[str] | Callable[[], list[str]],
        tokenizer: PreTrainedTokenizerBase,
        size: Size,
        device: torch.device,
        names: Sequence[str] = (),
    ) -> None:
        self._captions, self.size, self.device, self.names = captions, size, device, list(names)
        self.tokenizer = tokenizer
        self._empty = self.tokenise([""])

    @cached_property
    def captions(self) -> list[str]:
        """One for each picture."""
        return self._captions() if callable(self._captions) else self._captions

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of all captions."""
        return self.tokenise(self.captions)

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices (count,) of random pictures; on the CPU, so that fetching them does not wait for the device."""
        own = torch.Generator().manual_seed(generator.initial_seed())
        return torch.randint(len(self), (count,), generator=own)

    def draw_different(self, count: int, generator: torch.Generator) -> Tensor:
        """Like `draw`, but without repetition if there are few pictures; then at most as many as there are.

        With a picture twice in a batch, contrastive losses would treat its own caption as another picture's.
        """
        if len(self) > FEW_TIMES * count:
            return self.draw(count, generator)
        own = torch.Generator().manual_seed(generator.initial_seed())
        return torch.randperm(len(self), generator=own)[:count]

    @abstractmethod
    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        """Pixels (len(indices), 3, height, width), float32 in 0..1."""

    def references(self, indices: Tensor) -> Tensor:
        """Reference images for the IP-Adapter, which show the pictures' content in another form. Pixels as `images` returns
        them.

        Here: a random part of the picture, of at least `LEAST_PART` of each side, mirrored half of the time. An index always
        gives the same part.
        """
        pixels = self.images(indices)
        height, width = pixels.shape[-2:]
        for picture, index in zip(pixels, indices.tolist(), strict=True):
            draws = torch.rand(4, generator=torch.Generator().manual_seed(index)).tolist()
            rows, columns = (
                max(1, round(side * (LEAST_PART + share * (1 - LEAST_PART))))
                for side, share in ((height, draws[0]), (width, draws[0]))
            )
            top, left = round(draws[1] * (height - rows)), round(draws[2] * (width - columns))
            part = picture[None, :, top : top + rows, left : left + columns]
            part = F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
            picture.copy_(part.flip(-1) if draws[3] < 0.5 else part)
        return pixels

    def same_subject(self, indices: Tensor) -> Tensor:
        """Whether the references show the same thing as the pictures, and not something else in the same style: boolean
        (len(indices),)."""
        return torch.ones(len(indices), dtype=torch.bool)

    def shown(self, indices: Tensor) -> Tensor:
        """Which of ``names`` each picture shows: boolean (len(indices), len(names))."""
        return torch.zeros(len(indices), len(self.names), dtype=torch.bool, device=self.device)

    def tokenise(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids as int32 and attention mask as int8, each (len(texts), 77).

        No token of CLIP contains a space, so each different word is tokenised once: for the miniature's captions, 1.4 instead of
        24 s of processor time.
        """
        words = [text.split(" ") for text in texts]
        different = list(dict.fromkeys(chain.from_iterable(words)))
        known = dict(zip(different, self.tokenizer(different, add_special_tokens=False)["input_ids"], strict=True))
        length, start, end = self.tokenizer.model_max_length, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[start, *chain.from_iterable(map(known.__getitem__, one))][: length - 1] for one in words]
        for row in rows:
            row.append(end)
        mask = np.arange(length) < np.fromiter(map(len, rows), np.int64, len(rows))[:, None]
        ids = np.full(mask.shape, self.tokenizer.pad_token_id, np.int32)
        ids[mask] = np.fromiter(chain.from_iterable(rows), np.int32)
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask.astype(np.int8)).to(self.device)

    def tokens(self, indices: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 (len(indices), 77); the empty caption where ``keep`` (boolean) is false."""
        indices = indices.to(self.device)
        tokens, mask = (values[indices].long() for values in self._tokens)
        if keep is None:
            return tokens, mask
        empty_tokens, empty_mask = self._empty
        keep = keep[:, None]
        return torch.where(keep, tokens, empty_tokens.long()), torch.where(keep, mask, empty_mask.long())

    def empty(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 (count, 77), of the empty caption."""
        tokens, mask = self._empty
        return tokens.long().expand(count, -1), mask.long().expand(count, -1)
