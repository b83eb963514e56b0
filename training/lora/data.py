"""The pictures of a LoRA's training as semantic latents, and their captions: encoded once, and kept on the training device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade.images.tensors import to_pixels
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.sampling import Noise, finish
from cascade.sizes import semantic_size
from cascade.stages.encoder import for_encoder
from cascade.stages.prior import prior_steps
from cascade.weights import StageSettings
from training.lora.pictures import Captioned, buckets
from training.picture_folder import read

# Pictures that are encoded or sampled at a time.
AT_ONCE = 8


@torch.no_grad()
def encode_pictures(pictures: Sequence[Captioned], effnet: SemanticEncoder, device: torch.device) -> list[Tensor]:
    """Semantic latents of pictures of one size, float32 (16, h, w) each, on ``device``."""
    made: list[Tensor] = []
    for first in range(0, len(pictures), AT_ONCE):
        some = pictures[first : first + AT_ONCE]
        pixels = torch.cat([to_pixels(read(one.file, one.size[::-1]), device) for one in some])
        made += effnet(for_encoder(pixels)).float()
    return made


@torch.no_grad()
def sample_latents(
    prior: StableCascadeUNet,
    text: TextEmbeddings,
    negative: TextEmbeddings,
    *,
    resolution: int,
    settings: StageSettings,
    seeds: Sequence[int],
) -> Tensor:
    """Samples Stage C's latents of square pictures for texts, a few at a time: float32 (B, 16, h, w).

    Args:
        text: of B prompts.
        negative: of the empty prompt.
        resolution: pixels of a side.
        settings: of the sampler.
        seeds: B of them.
    """
    made = []
    for first in range(0, len(seeds), AT_ONCE):
        some = seeds[first : first + AT_ONCE]
        rows = slice(first, first + AT_ONCE)
        steps = prior_steps(
            prior,
            TextEmbeddings(text.tokens[rows], text.pooled[rows]),
            negative,
            size=semantic_size(resolution, resolution),
            noise=Noise(some, text.tokens.device),
            steps=settings.steps,
            guidance=settings.guidance,
            shift=settings.shift,
            rescale=settings.rescale,
        )
        made.append(finish(steps))
    return torch.cat(made)


class Texts:
    """The embeddings of captions.

    Args:
        count: of the captions; the empty one is the last.
        encode: from rows of captions (B,), int64 on the training device, to their embeddings.
        device: the training device.
        changing: whether embeddings change while training, and so are computed at every step; otherwise they are computed
            once, and the text encoder is not needed any more.
    """

    def __init__(
        self, count: int, encode: Callable[[Tensor], TextEmbeddings], device: torch.device, *, changing: bool
    ) -> None:
        self.empty = count - 1
        self._encode = encode if changing else None
        if not changing:
            with torch.no_grad():
                parts = [encode(rows) for rows in torch.arange(count, device=device).split(4 * AT_ONCE)]
            self._tokens = torch.cat([part.tokens for part in parts])
            self._pooled = torch.cat([part.pooled for part in parts])

    def rows(self, indices: Tensor) -> TextEmbeddings:
        """Those of the captions ``indices`` (B,)."""
        if self._encode is not None:
            return self._encode(indices)
        return TextEmbeddings(self._tokens[indices], self._pooled[indices])


class Latents:
    """Latents by size, from which micro-batches are drawn.

    Attributes:
        groups: of each size, latents (N, 16, h, w) and the rows of their captions (N,).
    """

    def __init__(self, groups: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.groups = list(groups)
        self._counts = torch.tensor([len(rows) for _, rows in groups], dtype=torch.float32)

    def __len__(self) -> int:
        return int(self._counts.sum())

    @classmethod
    def of_pictures(cls, pictures: Sequence[Captioned], effnet: SemanticEncoder, device: torch.device) -> "Latents":
        """Encodes pictures; the caption of picture i has the row i."""
        groups = []
        for indices in buckets(pictures).values():
            made = torch.stack(encode_pictures([pictures[i] for i in indices], effnet, device))
            groups.append((made, torch.tensor(indices, device=device)))
        return cls(groups)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (size, 16, h, w) and the rows of their captions (size,). All pictures are equally likely.

        A picture is drawn again only after all others of its size.
        """
        own = torch.Generator().manual_seed(generator.initial_seed())
        latents, rows = self.groups[int(torch.multinomial(self._counts, 1, generator=own))]
        rounds = -(-size // len(rows))
        chosen = torch.cat([torch.randperm(len(rows), generator=own) for _ in range(rounds)])[:size].to(rows.device)
        return latents[chosen], rows[chosen]
