"""Stage C, the prior: what a text says -> semantic latents, from which Stage B paints.

Latents, noise and times are float32 whatever the network's dtype. What does not depend on the step is computed once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.conditioning import TextEmbeddings
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import Noise, Step, diffuse, sample, with_guidance


def prior_steps(
    prior: StableCascadeUNet,
    text: TextEmbeddings,
    negative: TextEmbeddings | None = None,
    *,
    size: tuple[int, int],
    noise: Noise,
    steps: int = 20,
    guidance: float = 4.0,
    shift: float = 2.0,
    rescale: float = 0.7,
    sampler: str = "ddpm",
    image: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[Step]:
    """Sample semantic latents (B, 16, h, w), step by step; `sampling.finish` takes all steps. B: the seeds of `noise`.

    Args:
        prior: Stage C.
        text: what to show: the embeddings of B prompts, or of one for all.
        negative: what not to show, in the same form; normally those of the empty prompt. Needed, and used, for
            guidance above 1 only: otherwise the unconditional half is not computed.
        size: (h, w) of the latents, see `sizes.semantic_size`.
        noise: draws the initial noise, then a step's noise when its turn comes.
        steps, shift, sampler: see `sampling.sample`.
        guidance, rescale: see `sampling.guide`.
        image: image embeddings (B or 1, N, D), for N image prompts. The unconditional half has zeros.
        start: semantic latents (B or 1, 16, h, w) of a picture to begin with instead of noise: image-to-image.
        strength: in (0, 1], how much of `start` is overpainted: the time to which it is noised. As many of the steps
            are taken as belong to that time: see `steps_taken`.

    Raises:
        ValueError: an argument does not fit the others or lies outside of its range.
    """
    batch = len(noise)
    shape = (prior.config.in_channels, *size)
    if start is None and strength != 1:
        raise ValueError(f"strength is {strength}, but there is no start; without one it must be 1.")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must lie above 0 and not above 1.")
    if start is not None and start.shape[1:] != shape:
        raise ValueError(f"start has the shape {tuple(start.shape)}; it must be (1 or {batch}, {str(shape)[1:]}.")
    if guidance > 1 and negative is None:
        raise ValueError(f"guidance is {guidance}; above 1 it needs negative embeddings.")

    x = noise(*shape)
    if start is not None:
        x = diffuse(start.expand(batch, *shape), x, torch.tensor(strength), shift)
    halves = [text] if guidance <= 1 else [text, negative]
    with torch.no_grad():
        conditions = prior.condition(
            clip_text_pooled=torch.cat([half.pooled.expand(batch, -1, -1) for half in halves]),
            clip_text=torch.cat([half.tokens.expand(batch, -1, -1) for half in halves]),
            clip_img=None if image is None else _image_halves(image.expand(batch, -1, -1), len(halves)),
        )

    @torch.no_grad()
    def model(x: Tensor, t: Tensor) -> Tensor:
        return prior(x, t, conditions)

    return sample(
        model if guidance <= 1 else with_guidance(model, guidance, rescale),
        x,
        steps=steps_taken(steps, strength),
        shift=shift,
        sampler=sampler,
        t_start=strength,
        noise=lambda _: noise(*shape),
    )


def steps_taken(steps: int, strength: float) -> int:
    """How many of a schedule's steps lie below the time `strength`, in (0, 1]: at least one, if there are any."""
    return min(steps, max(int(round(steps * strength, 6)), 1))  # rounded first: 100 * 0.29 is a little less than 29


def _image_halves(image: Tensor, halves: int) -> Tensor:
    return torch.cat([image, torch.zeros_like(image)][:halves])
