"""Stage B, the decoder: semantic latents -> decoder latents, which Stage A turns into pixels.

Latents, noise and times are float32 whatever the network's dtype. What does not depend on the step is computed once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.networks.protocol import UNet
from cascade.sampling import Noise, Sample, Step, beside_zeros, sample, with_guidance


def decoder_steps(
    decoder: UNet,
    semantic: Tensor,
    pooled: Tensor,
    negative_pooled: Tensor | None = None,
    *,
    size: tuple[int, int],
    noise: Noise,
    steps: int = 10,
    guidance: float = 1.1,
    shift: float = 1.0,
    rescale: float = 0.7,
    sampler: str = "ddpm",
    sample: Sample = sample,
) -> Iterator[Step]:
    """Sample Stage B's latents (B, 4, h, w), step by step; `sampling.finish` takes all steps. B: the seeds of `noise`.

    Args:
        decoder: Stage B.
        semantic: semantic latents (B, 16, h, w); the unconditional half has zeros.
        pooled: the pooled text embedding (B or 1, 1, D).
        negative_pooled: that of the negative prompt, for guidance above 1: otherwise the unconditional half is not
            computed.
        size: (height, width) of the latents, even, see `sizes.decoder_size`.
        noise: draws the initial noise, then a step's noise when its turn comes.
        steps, shift, sampler: see `sampling.sample`.
        guidance, rescale: see `sampling.guide`.
        sample: takes the steps.

    Raises:
        ValueError: an argument does not fit the others or lies outside of its range.
    """
    batch = len(noise)
    if semantic.shape[0] != batch:
        raise ValueError(f"There are semantic latents of {semantic.shape[0]} images; noise has seeds for {batch}.")
    if guidance > 1 and negative_pooled is None:
        raise ValueError(f"guidance is {guidance}; above 1 it needs a negative embedding.")

    shape = (decoder.config.in_channels, *size)
    x = noise(*shape)
    halves = [pooled] if guidance <= 1 else [pooled, negative_pooled]
    with torch.no_grad():
        conditions = decoder.condition(
            # In memory of their own: of a view that repeats one row, cuBLAS's products are rounded otherwise.
            torch.cat([half.expand(batch, -1, -1) for half in halves]),
            effnet=beside_zeros(semantic, len(halves)),
            latent_size=size,
        )

    @torch.no_grad()
    def model(x: Tensor, t: Tensor) -> Tensor:
        return decoder(x, t, conditions)

    return sample(
        model if guidance <= 1 else with_guidance(model, guidance, rescale),
        x,
        steps=steps,
        shift=shift,
        sampler=sampler,
        noise=lambda _: noise(*shape),
    )
