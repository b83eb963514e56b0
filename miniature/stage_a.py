"""Stage A alone, of a loaded `Cascade`, which has no method for it."""

import torch
from PIL import Image
from torch import Tensor

from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.stages.pixels import decode_pixels


def decode(cascade: Cascade, latents: Tensor) -> list[Image.Image]:
    """Pictures of Stage B's latents (B, 4, h, w), such as the `Progress.latents` of one of its steps."""
    return [to_image(pixels) for pixels in decode_pixels(cascade.vqgan, latents, cascade.stage_a_scale)]


def encode_and_decode(cascade: Cascade, image: Image.Image) -> Image.Image:
    """A picture after Stage A's encoder and decoder; both sides are multiples of 4 pixels."""
    vqgan = cascade.vqgan
    with torch.no_grad():
        latents = vqgan.encode(to_pixels(image, cascade.device).to(vqgan.dtype))
    (picture,) = (to_image(pixels) for pixels in decode_pixels(vqgan, latents))
    return picture
