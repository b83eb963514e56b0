"""The semantic encoder: pixels -> semantic latents, as Stage C makes them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade import sizes


def for_encoder(pixels: Tensor, compression: float = sizes.SEMANTIC_PIXELS) -> Tensor:
    """Resize pixels (B, 3, H, W) to the encoder's input size, about 3/4, so that its latents have Stage C's size.

    compression: pixels to a semantic latent, see `sizes.semantic_size`.
    """
    size = sizes.encoder_size(*pixels.shape[-2:], compression)
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


@torch.no_grad()
def encode_pixels(
    effnet: Callable[[Tensor], Tensor], pixels: Tensor, compression: float = sizes.SEMANTIC_PIXELS
) -> Tensor:
    """Pictures (B, 3, H, W) in 0..1 -> semantic latents, float32 (B, 16, h, w), such as Stage C makes for H x W pixels.

    A size that is not a multiple of 8 is padded to one, where `Cascade.generate` would crop.

    Args:
        effnet: the semantic encoder.
        pixels: on its device.
        compression: pixels to a semantic latent, see `sizes.semantic_size`.

    Raises:
        ValueError: H or W lies outside of 64 to 4096.
    """
    height, width = sizes.native_size(*pixels.shape[-2:])
    pixels = sizes.pad(pixels.float(), height, width)
    return effnet(for_encoder(pixels, compression)).float()
