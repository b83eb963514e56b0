"""Image prompts: turns images into embeddings that Stage C gets in addition to those of the text."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from cascade.images.preprocessing import ClipPreprocessor
from cascade.networks.clip import VisionTower
from cascade.stages.text import Run, directly


class ImagePromptEncoder:
    """CLIP's vision tower.

    Args:
        processor: crops, resizes and normalises.
        encoder: CLIP ViT-L/14 in the published model.
    """

    def __init__(self, processor: ClipPreprocessor, encoder: VisionTower) -> None:
        self.processor = processor
        self.encoder = encoder

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image], run: Run = directly) -> Tensor:
        """Encode images of any size and mode.

        Args:
            images: B images.
            run: runs the network.

        Returns:
            (B, 1, D), one token an image, in the encoder's dtype and on its device. D is 768 in the published model.
        """
        return self._run(images, run)[0]

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image], run: Run = directly) -> Tensor:
        """The input of an IP-Adapter: the last hidden states but one.

        Args: see `encode`.

        Returns:
            (B, S, W), in the encoder's dtype and on its device. In the published model, S is 257 and W 1024.
        """
        return self._run(images, run)[1]

    def _run(self, images: Sequence[Image.Image], run: Run) -> tuple[Tensor, Tensor]:
        pixels = self.processor(images)
        return run(self._encode, pixels.to(self.encoder.device, self.encoder.dtype))

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        made = self.encoder(pixels, output_hidden_states=True)
        return made.image_embeds.unsqueeze(1), made.hidden_states[-2]
