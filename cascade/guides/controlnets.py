"""ControlNets: controls become what is added to Stage C's residual blocks."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade import sizes
from cascade.guides.controls import Control, canny, inpainting, super_resolution
from cascade.images.tensors import fitted, to_pixels
from cascade.networks.controlnet import ControlNet
from cascade.running.runner import Runner
from cascade.stages.encoder import for_encoder
from cascade.stages.prior import Residuals


class ControlNets:
    """The ControlNets of a model.

    Args:
        networks: by the kind of controls that they read.
        encode: a picture and its compression -> its semantic latents, float32 (1, 16, h, w); for "super_resolution".
        runner: runs them.
    """

    def __init__(
        self, networks: Mapping[str, ControlNet], encode: Callable[[Image.Image, float], Tensor], runner: Runner
    ) -> None:
        self.networks = networks
        self._encode = encode
        self._runner = runner

    @torch.no_grad()
    def residuals(
        self,
        control: Control,
        size: sizes.Size,
        mask: np.ndarray | None,
        compression: float = sizes.SEMANTIC_PIXELS,
    ) -> Residuals:
        """What a control adds to Stage C: one forward of its ControlNet.

        Args:
            control: of one of the kinds of `networks`.
            size: (height, width) of the pictures.
            mask: bool, of that size; for "inpainting".
            compression: pixels to a semantic latent, see `sizes.semantic_size`.
        """
        name = f"controlnet_{control.kind}"
        blocks = self._runner.run(name, self.networks[control.kind], self._read(control, mask, *size, compression))
        return Residuals(blocks, control.scale, control.start, control.end)

    def _read(self, control: Control, mask: np.ndarray | None, height: int, width: int, compression: float) -> Tensor:
        """A ControlNet's input for pictures of this size."""
        if control.kind == "super_resolution":
            half = -(-height // 2), -(-width // 2)
            return super_resolution(self._encode(fitted(control.image, *half), compression))
        native = sizes.native_size(height, width)
        pixels = sizes.pad(to_pixels(fitted(control.image, height, width), self._runner.device), *native)
        if control.kind == "canny":
            return canny(for_encoder(pixels, compression), control.canny_side)
        masked = sizes.pad(torch.from_numpy(mask).to(pixels)[None, None], *native)
        return inpainting(for_encoder(pixels, compression), for_encoder(masked, compression) > 0)
