"""Semantic latents -> pixels, by Stage B and Stage A; and back, by the semantic encoder.

Latents, noise, times and the pixels that are returned are float32 whatever the networks' dtype. What does not depend
on the step is computed once.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import sizes
from cascade.memory import UNet
from cascade.networks.stage_a import StageA
from cascade.sampling import Noise, Step, beside_zeros, sample, with_guidance

# Of Stage A: latents, of which a tile with what reaches into it has five times as many; and bytes for each latent, each
# channel of its widest level and each byte of a number, a quarter more than measured.
SMALLEST_TILE = 24
DECODING_BYTES = 24


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


@torch.no_grad()
def decode_pixels(
    vqgan: StageA, latents: Tensor, scale: float | None = None, tile: int | None = None
) -> Iterator[Tensor]:
    """Stage B's latents (B, 4, h, w) -> pictures (3, 4h, 4w) in 0..1, one by one: at full size, pixels take memory.

    Args:
        vqgan: Stage A.
        scale: what Stage A multiplies latents with; None: as its configuration says.
        tile: latents, at least 1: pictures are made in squares of this edge, see `tile_within`. Each is decoded with as
            much around it as reaches into it, so that it is what it would be in the whole. None: the whole at once.
    """
    height, width = latents.shape[-2:]
    tile = tile or max(height, width)
    margin, factor = vqgan.reach, vqgan.factor
    for one in latents.to(vqgan.dtype).split(1):
        if tile >= max(height, width):
            yield vqgan.decode(one, scale=scale)[0].float().clamp(0, 1)
            continue
        pixels = one.new_empty(3, factor * height, factor * width, dtype=torch.float32)
        for top, left in itertools.product(range(0, height, tile), range(0, width, tile)):
            above, before = max(top - margin, 0), max(left - margin, 0)
            part = vqgan.decode(one[..., above : top + tile + margin, before : left + tile + margin], scale=scale)[0]
            place = pixels[:, factor * top : factor * (top + tile), factor * left : factor * (left + tile)]
            part = part[:, factor * (top - above) :, factor * (left - before) :]
            place.copy_(part[:, : place.shape[1], : place.shape[2]])
        yield pixels.clamp_(0, 1)


def decoding_bytes(vqgan: StageA, height: int, width: int) -> int:
    """About what Stage A needs to decode latents of (height, width) at once: 0.9 GiB for 256 x 256 in bfloat16 (H100)."""
    return DECODING_BYTES * vqgan.config.embed_dim * vqgan.dtype.itemsize * height * width


def tile_within(vqgan: StageA, height: int, width: int, room: int) -> int:
    """The tile for latents of (height, width) with which Stage A needs no more than `room` bytes, or the smallest."""
    tile, around = max(height, width), 2 * vqgan.reach
    while tile > SMALLEST_TILE:
        if decoding_bytes(vqgan, min(height, tile + around), min(width, tile + around)) <= room:
            break
        tile = max(-(-tile // 2), SMALLEST_TILE)
    return tile


def for_encoder(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) at the size, some three quarters, at which the semantic encoder makes of them what Stage C makes."""
    size = sizes.encoder_size(*pixels.shape[-2:])
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


@torch.no_grad()
def encode_pixels(effnet: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 -> semantic latents, float32 (B, 16, h, w), such as Stage C makes for H x W pixels.

    A size that is no multiple of 8 is padded to it, where `Cascade.generate` would crop.

    Args:
        effnet: the semantic encoder, however it is run.
        pixels: on its device.

    Raises:
        ValueError: H or W lies outside of 64 to 2048.
    """
    height, width = sizes.native_size(*pixels.shape[-2:])
    pixels = sizes.pad(pixels.float(), height, width)
    return effnet(for_encoder(pixels)).float()
