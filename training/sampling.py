"""Pictures by networks that are being trained, sampled by the engine's own steps. Picture i has the noise of seed i.

A `Cascade` has all stages; here are those that a task has.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.sampling import Noise, finish
from cascade.sizes import decoder_size, semantic_size
from cascade.stages.decoder import decoder_steps
from cascade.stages.pixels import decode_pixels
from cascade.stages.prior import Residuals, prior_steps
from training.dataset import Dataset


def text_to_semantic(
    prior: StableCascadeUNet,
    text_encoder: CLIPTextModelWithProjection,
    dataset: Dataset,
    indices: Tensor,
    residuals: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Stage C: semantic latents, float32 (B, 16, h, w), for the captions ``indices`` (B,), with the authors' settings.

    Args:
        residuals: of a ControlNet, {k: (B, C, h, w)}; added with the caption and without.
    """
    tokens, mask = (torch.cat(pair) for pair in zip(dataset.tokens(indices), dataset.empty(len(indices)), strict=True))
    output = text_encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    halves = zip(output.hidden_states[-1].chunk(2), output.text_embeds.unsqueeze(1).chunk(2), strict=True)
    text, negative = (TextEmbeddings(*half) for half in halves)
    both = {k: torch.cat([residual, residual]) for k, residual in (residuals or {}).items()}
    steps = prior_steps(
        prior,
        text,
        negative,
        size=semantic_size(*dataset.size),
        noise=Noise(range(len(indices)), tokens.device),
        controls=[Residuals(both)] if both else (),
    )
    return finish(steps)


def semantic_to_pixels(
    decoder: StableCascadeUNet, vqgan: StageA, semantic: Tensor, pooled: Tensor, size: tuple[int, int]
) -> Tensor:
    """Stages B and A: pixels, float32 (B, 3, H, W) in 0..1, in 10 steps without guidance.

    Args:
        semantic: semantic latents (B, 16, h, w).
        pooled: the captions' pooled embeddings (B, 1, D).
        size: height and width of the pictures in pixels, multiples of 8.
    """
    noise = Noise(range(len(semantic)), semantic.device)
    steps = decoder_steps(decoder, semantic, pooled, size=decoder_size(*size), noise=noise, guidance=1.0)
    return torch.stack(list(decode_pixels(vqgan, finish(steps))))
