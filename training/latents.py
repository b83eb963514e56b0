"""The data of the diffusion stages, encoded once by the frozen networks, and kept on the training device.

Composing and encoding in every step would double its time: 30 ms of a step of Stage B alone (the miniature, batch 192, H200).
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.stage_a import StageA
from cascade.sizes import ENCODER_STRIDE, Size
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.pictures import normalise, resize_pixels
from training.shapes import Shapes, shares

BATCH = 256

Encode = Callable[[Tensor], tuple[Tensor, ...]]
"""Pixels (B, 3, H, W) in 0..1 to tensors (B, ...)."""


def encode_pictures(dataset: Dataset, indices: range, size: Size, encode: Encode) -> tuple[Tensor, ...]:
    """Encodes the pictures ``indices`` (N) at ``size``, a batch at a time: tensors (N, ...), float16 or bytes.

    Processes that train together divide the batches, and each gets what all have encoded. All must call this, with the same
    arguments.
    """
    batch = max(1, BATCH * dataset.size[0] * dataset.size[1] // (size[0] * size[1]))
    batches = [indices[first : first + batch] for first in range(0, len(indices), batch)]
    processes, own = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if len(batches) < processes:  # without a batch, a process would not know the tensors' shapes
        processes, own = 1, 0
    made: tuple[Tensor, ...] = ()
    for chosen in batches[own::processes]:
        encoded = encode(dataset.images(torch.arange(chosen.start, chosen.stop), size))
        made = made or tuple(_zeros(len(indices), value) for value in encoded)
        for whole, value in zip(made, encoded, strict=True):
            whole[chosen.start - indices.start : chosen.stop - indices.start] = value
    if processes > 1:
        for whole in made:
            dist.all_reduce(whole)  # adds: where others have encoded, there are zeros
    return made


def _zeros(count: int, encoded: Tensor) -> Tensor:
    """For ``count`` rows like those of ``encoded``; float16, unless these are bytes."""
    dtype = encoded.dtype if encoded.dtype == torch.uint8 else torch.float16
    return torch.zeros(count, *encoded.shape[1:], dtype=dtype, device=encoded.device)


class TextTable:
    """The embeddings of all captions, and of the empty one.

    Attributes:
        pooled: float16 (N + 1, 1, D), the projected embeddings; the last one is the empty caption's.
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
        """The rows of the captions ``indices`` (B,); that of the empty caption if ``keep`` (B,) is false."""
        return torch.where(keep, indices, len(self.pooled) - 1)


class Encoded:
    """A dataset for the diffusion stages, encoded at every size of ``shapes``.

    Args:
        dataset: the pictures and captions.
        shapes: the sizes.
        text_encoder: encodes the captions.
        encode: encodes the pictures.
        with_tokens: whether the captions' hidden states are kept, besides their pooled embeddings.
        more: further encoders. Of every size, each encodes a share of the pictures; the shares are equally large.

    Attributes:
        text: the captions' embeddings.
    """

    def __init__(
        self,
        dataset: Dataset,
        shapes: Shapes,
        text_encoder: CLIPTextModelWithProjection,
        encode: Encode,
        *,
        with_tokens: bool = False,
        more: Sequence[Encode] = (),
    ) -> None:
        self.shapes = shapes
        # Of each size, the pictures' indices and their tensors; of each further encoder, by the same sizes, its share.
        self._parts: dict[Size, tuple[range, tuple[Tensor, ...]]] = {}
        self._shares: dict[Size, list[tuple[range, tuple[Tensor, ...]]]] = {}
        with (
            torch.no_grad(),
            torch.autocast(dataset.device.type, torch.bfloat16, enabled=dataset.device.type == "cuda"),
        ):
            self.text = TextTable(dataset, text_encoder.eval(), with_tokens=with_tokens)
            for size, indices in shapes.split(len(dataset)).items():
                self._parts[size] = indices, encode_pictures(dataset, indices, size, encode)
                self._shares[size] = [
                    (share, encode_pictures(dataset, share, size, one))
                    for share, one in zip(shares(indices, len(more)), more, strict=True)
                ]

    def draw(
        self, index: int, native_batch: int, generator: torch.Generator, more: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Micro-batch ``index``: the pictures' indices (B,) and their tensors (B, ...), float32, on the device.

        Args:
            native_batch: pictures of the native size; of other sizes, as many as have the same area.
            more: draws from the share of this further encoder, whose tensors come last.
        """
        size = self.shapes.at(index)
        indices, tensors = self._parts[size]
        drawn_from, further = (indices, ()) if more is None else self._shares[size][more]
        count = self.shapes.batch_size(size, native_batch)
        chosen = torch.randint(len(drawn_from), (count,), generator=generator, device=generator.device)
        place = chosen + (drawn_from.start - indices.start)
        made = [*(tensor[place] for tensor in tensors), *(tensor[chosen] for tensor in further)]
        return chosen + drawn_from.start, tuple(tensor.float() for tensor in made)


def at_scale(pixels: Tensor, scale: float) -> Tensor:
    """Resizes pixels (B, 3, H, W) for the semantic encoder, so that one latent stands for ``scale`` pixels, nearly."""
    rows, columns = (max(1, round(side / scale)) for side in pixels.shape[-2:])
    return resize_pixels(pixels, (rows * ENCODER_STRIDE, columns * ENCODER_STRIDE))


def stage_b_encoder(vqgan: StageA, effnet: SemanticEncoder) -> Encode:
    """Pixels to Stage B's latents (B, 4, H/4, W/4) and semantic latents (B, 16, h, w)."""
    vqgan, effnet = vqgan.eval(), effnet.eval()
    return lambda pixels: (vqgan.encode(pixels), effnet(for_encoder(pixels)))


def semantic_encoder(effnet: SemanticEncoder, scale: float) -> Encode:
    """Pixels to semantic latents of ``scale`` pixels each, (B, 16, H/scale, W/scale)."""
    effnet = effnet.eval()
    return lambda pixels: (effnet(at_scale(pixels, scale)),)


def stage_c_encoder(effnet: SemanticEncoder, image_encoder: CLIPVisionModelWithProjection) -> Encode:
    """Pixels to semantic latents (B, 16, h, w) and CLIP image embeddings (B, 1, D)."""
    effnet, image_encoder = effnet.eval(), image_encoder.eval()
    side = image_encoder.config.image_size
    return lambda pixels: (
        effnet(for_encoder(pixels)),
        image_encoder(pixel_values=normalise(pixels, side)).image_embeds.unsqueeze(1),
    )
