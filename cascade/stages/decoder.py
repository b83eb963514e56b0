"""Stage B, the decoder: semantic latents -> decoder latents, which Stage A turns into pixels.

Latents, noise and times are float32 whatever the network's dtype. What does not depend on the step is computed once.
"""

from collections.abc import Callable, Generator, Iterator

import torch
from torch import Tensor

from cascade.networks.protocol import UNet
from cascade.sampling import Noise, Sampling, Step, beside_zeros, guide, with_guidance
from cascade.stages.tiles import Part, Predict, Tiles, condition_in_bands, predict_tiles

# How many samples of a picture in tiles the network gets at once, if memory suffices: three tiles, or one with guidance. More
# are hardly faster: of four pictures of 1024x1024 at once, each takes 13 % less time than alone (H100).
SAMPLES = 3


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
    sampling: type[Sampling] = Sampling,
    at_once: int | None = None,
) -> Iterator[Step | Part]:
    """Sample Stage B's latents (B, 4, h, w), step by step; `sampling.finish` takes all steps. B: the seeds of `noise`.

    Args:
        decoder: Stage B.
        semantic: semantic latents (B, 16, h, w); the unconditional half has zeros.
        pooled: the pooled text embedding (B or 1, 1, D).
        negative_pooled: that of the negative prompt, for guidance above 1: otherwise the unconditional half is not
            computed.
        size: (height, width) of the latents, even, see `sizes.decoder_size`.
        noise: draws the initial noise, then a step's noise when its turn comes.
        steps, shift, sampler: see `Sampling`.
        guidance, rescale: see `sampling.guide`.
        sampling: takes the steps.
        at_once: in tiles (`stages.tiles`), of which the network gets about so many together, both halves counted; then a
            `Part` is yielded between them. None: as a whole.

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
    # In memory of their own: of a view that repeats one row, cuBLAS's products are rounded otherwise.
    texts = torch.cat([half.expand(batch, -1, -1) for half in halves])
    maps = beside_zeros(semantic, len(halves))
    taken = sampling(x, steps=steps, shift=shift, sampler=sampler, noise=lambda _: noise(*shape))
    if at_once is None:
        model = _whole(decoder, texts, maps, size)
        return taken.steps(model if guidance <= 1 else with_guidance(model, guidance, rescale))
    tiles = Tiles(*size)
    conditions = condition_in_bands(decoder, texts, maps, tiles)
    predict = predict_tiles(decoder, conditions, tiles, tiles_together(at_once, len(texts)))
    return _steps_in_tiles(taken, predict if guidance <= 1 else _guided(predict, guidance, rescale))


def tiles_together(at_once: int, samples: int) -> int:
    """How many tiles the network gets together, if each counts `samples` times: at least one."""
    return max(at_once // samples, 1)


def _whole(
    decoder: UNet, pooled: Tensor, semantic: Tensor, size: tuple[int, int]
) -> Callable[[Tensor, Tensor], Tensor]:
    with torch.no_grad():
        conditions = decoder.condition(pooled, effnet=semantic, latent_size=size)

    @torch.no_grad()
    def model(x: Tensor, t: Tensor) -> Tensor:
        return decoder(x, t, conditions)

    return model


def _steps_in_tiles(sampling: Sampling, predict: Predict) -> Iterator[Step | Part]:
    """`Sampling.steps` for a prediction in parts."""
    while sampling.index < sampling.total:
        yield sampling.take((yield from predict(sampling.x, sampling.t)))


def _guided(predict: Predict, scale: float, rescale: float) -> Predict:
    """`sampling.with_guidance` for a prediction in parts. The latents' deviation, by which it rescales, is that of the whole."""

    def guided(x: Tensor, t: Tensor) -> Generator[Part, None, Tensor]:
        both = yield from predict(torch.cat([x, x]), torch.cat([t, t]))
        return guide(*both.chunk(2), scale, rescale)

    return guided
