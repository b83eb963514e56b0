"""The data of the diffusion stages, encoded once by the networks that stay frozen, and kept on the training device.

A step of Stage B alone on an H200, batch 192 of the miniature, took 30 ms with composing and encoding in it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.stage_a import StageA
from cascade.sizes import Size
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.pictures import normalise
from training.shapes import Shapes

BATCH = 256


def encode_pictures(
    dataset: Dataset, indices: range, size: Size, encode: Callable[[Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What ``encode`` makes of the pictures ``indices`` (N) at ``size``, a batch at a time: tensors (N, ...).

    They are float16; those of bytes stay bytes.
    """
    batch = max(1, BATCH * dataset.size[0] * dataset.size[1] // (size[0] * size[1]))
    parts = []
    for first in range(indices.start, indices.stop, batch):
        chosen = torch.arange(first, min(first + batch, indices.stop))
        encoded = encode(dataset.images(chosen, size))
        parts.append([value if value.dtype == torch.uint8 else value.half() for value in encoded])
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


class TextTable:
    """The embeddings of all captions, and of the empty one.

    Attributes:
        pooled: float16 (N + 1, 1, D), the projected embeddings; the last is the empty caption's.
        tokens: float16 (N + 1, 77, D), the hidden states before the final LayerNorm; None unless asked for.
    """

    def __init__(self, dataset: Dataset, text_encoder: CLIPTextModelWithProjection, *, with_tokens: bool) -> None:
        pooled, tokens = [], []
        for chosen in torch.arange(len(dataset)).split(4 * BATCH):
            self._encode(text_encoder, *dataset.tokens(chosen), pooled, tokens if with_tokens else None)
        self._encode(text_encoder, *dataset.empty(1), pooled, tokens if with_tokens else None)
        self.pooled = torch.cat(pooled)
        self.tokens = torch.cat(tokens) if with_tokens else None

    @staticmethod
    def _encode(
        text_encoder: CLIPTextModelWithProjection,
        ids: Tensor,
        mask: Tensor,
        pooled: list[Tensor],
        tokens: list[Tensor] | None,
    ) -> None:
        output = text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=tokens is not None)
        pooled.append(output.text_embeds.unsqueeze(1).half())
        if tokens is not None:
            tokens.append(output.hidden_states[-1].half())

    def rows(self, indices: Tensor, keep: Tensor) -> Tensor:
        """``indices`` (B,), and the empty caption's row where ``keep`` (B,) is false."""
        return torch.where(keep, indices, len(self.pooled) - 1)


class Encoded:
    """A dataset for the diffusion stages: for every size of ``shapes``, tensors by the networks ``encode`` calls.

    Attributes:
        parts: by size, the indices of its pictures and their tensors, of float16 or bytes.
        text: the captions' embeddings.
    """

    def __init__(
        self,
        dataset: Dataset,
        shapes: Shapes,
        text_encoder: CLIPTextModelWithProjection,
        encode: Callable[[Tensor], tuple[Tensor, ...]],
        *,
        with_tokens: bool = False,
    ) -> None:
        self.shapes = shapes
        with (
            torch.no_grad(),
            torch.autocast(dataset.device.type, torch.bfloat16, enabled=dataset.device.type == "cuda"),
        ):
            self.text = TextTable(dataset, text_encoder.eval(), with_tokens=with_tokens)
            self.parts = {
                size: (indices, encode_pictures(dataset, indices, size, encode))
                for size, indices in shapes.split(len(dataset)).items()
            }

    def draw(self, index: int, native_batch: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Micro-batch ``index``: the pictures' indices (B,) and their tensors (B, ...), float32, on the device."""
        size = self.shapes.at(index)
        indices, tensors = self.parts[size]
        count = self.shapes.batch_size(size, native_batch)
        chosen = torch.randint(len(indices), (count,), generator=generator, device=generator.device)
        return chosen + indices.start, tuple(tensor[chosen].float() for tensor in tensors)


def stage_b_encoder(vqgan: StageA, effnet: SemanticEncoder) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Pixels to decoder latents (B, 4, H/4, W/4) and semantic latents (B, 16, h, w)."""
    vqgan, effnet = vqgan.eval(), effnet.eval()
    return lambda pixels: (vqgan.encode(pixels), effnet(for_encoder(pixels)))


def stage_c_encoder(
    effnet: SemanticEncoder, image_encoder: CLIPVisionModelWithProjection
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Pixels to semantic latents (B, 16, h, w) and CLIP image embeddings (B, 1, D)."""
    effnet, image_encoder = effnet.eval(), image_encoder.eval()
    side = image_encoder.config.image_size
    return lambda pixels: (
        effnet(for_encoder(pixels)),
        image_encoder(pixel_values=normalise(pixels, side)).image_embeds.unsqueeze(1),
    )
