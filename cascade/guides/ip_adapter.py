"""The IP-Adapter: turns reference images into keys and values for Stage C's attention blocks, in addition to the prompt's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cascade import sizes
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.images.colours import to_rgb
from cascade.limits import InputError
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.unet import StableCascadeUNet
from cascade.running.runner import Runner
from cascade.stages.prior import AdapterImage


@dataclass(frozen=True)
class Reference:
    """An image for the IP-Adapter; `Request` documents the attributes.

    Attributes:
        image: of any size and mode.
        scale, start, end: numbers.
        mask: of mode "L", see `read_mask`.
    """

    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Image.Image | None = None


class IPAdapterGuide:
    """The IP-Adapter of a model.

    Args:
        network: the adapter; None: the model has none.
        images: encodes images; None: the model has no image encoder.
        prior: Stage C.
        runner: runs both.
    """

    def __init__(
        self, network: IPAdapter | None, images: ImagePromptEncoder | None, prior: StableCascadeUNet, runner: Runner
    ) -> None:
        self._network, self._images, self._prior, self._runner = network, images, prior, runner

    def check(self, mode: str) -> None:
        """Make sure that this model can use reference images in this mode, one of `networks.ip_adapter.MODES`.

        Raises:
            ValueError: it has no IP-Adapter or no image encoder, they do not fit each other, or the adapter names no block
                for the mode.
        """
        if self._network is None:
            raise ValueError(
                "This model has no IP-Adapter, which ip_adapter_images need; docs/ip-adapter.md says how to train one."
            )
        if self._images is None:
            raise ValueError("This model has no image encoder, which ip_adapter_images need.")
        wrong = self._network.misfit(self._prior, self._images.encoder.config.hidden_size)
        if wrong is not None:
            raise ValueError(wrong)
        if not self._network.blocks_of(mode):
            raise ValueError(
                f"ip_adapter_mode is {mode!r}, but the IP-Adapter's configuration names no {mode}_blocks; use 'all'."
            )

    @torch.no_grad()
    def encode(
        self, references: Sequence[Reference], mode: str, size: sizes.Size, compression: float = sizes.SEMANTIC_PIXELS
    ) -> list[AdapterImage]:
        """The references' keys and values for Stage C: one forward of the image encoder, and one of the adapter.

        Args:
            references: those with a scale above 0.
            mode: one that `check` accepts.
            size: (height, width) of the pictures.
            compression: pixels to a semantic latent, see `sizes.semantic_size`.
        """
        images = [to_rgb(one.image) for one in references]
        features = self._images.features(images, partial(self._runner.run_for_any_size, "image_encoder"))
        pairs = self._runner.run_for_any_size("ip_adapter", self._network, features)
        chosen = self._network.blocks_of(mode)
        return [
            AdapterImage(
                {block: tuple(x[place : place + 1] for x in pairs[block]) for block in chosen},
                one.scale,
                one.start,
                one.end,
                None if one.mask is None else mask_of_latents(one.mask, size, compression).to(self._runner.device),
            )
            for place, one in enumerate(references)
        ]


def read_mask(name: str, mask: Image.Image) -> Image.Image:
    """A mask of any size and mode as grey, "L": white where the image acts on the picture. Transparent counts as black.

    Args:
        name: the mask's name in errors.

    Raises:
        InputError: it is black all over.
        ValueError: it has 32 bits per channel.
    """
    grey = mask if mask.mode == "L" and not mask.has_transparency_data else None
    grey = to_rgb(mask, name, background="black").convert("L") if grey is None else grey
    if not np.asarray(grey).any():
        raise InputError(f"{name} is black all over, so that its image would be used nowhere.")
    return grey


def mask_of_latents(mask: Image.Image, size: sizes.Size, compression: float = sizes.SEMANTIC_PIXELS) -> Tensor:
    """An image's weight at each semantic latent: the mean of the mask's pixels there, float32 (1, 1, h, w) in 0..1.

    Args:
        mask: of mode "L". It is scaled to the pictures' size, and what exceeds their shape is cut off evenly.
        size: (height, width) of the pictures.
        compression: pixels to a semantic latent, see `sizes.semantic_size`.
    """
    height, width = size
    pixels = np.asarray(ImageOps.fit(mask, (width, height), Image.Resampling.BOX), np.float32) / 255
    native = sizes.native_size(height, width)
    padded = sizes.pad(torch.from_numpy(pixels)[None, None], *native)
    return F.adaptive_avg_pool2d(padded, sizes.semantic_size(*native, compression))
