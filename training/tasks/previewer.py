"""The previewer: turns semantic latents into a small picture, with eight pixels per latent, to show Stage C's progress."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.pictures import for_previewer, grid, psnr
from training.task import Task
from training.values import Amount


class PreviewerTask(Task):
    """Mean squared error against the picture at 3/16 of its size, from latents with ``semantic_noise`` (a deviation)."""

    def __init__(
        self,
        previewer: Previewer,
        *,
        effnet: SemanticEncoder,
        dataset: Dataset,
        unseen: Dataset,
        semantic_noise: Amount,
    ) -> None:
        super().__init__()
        self.previewer = previewer
        self.frozen = {"effnet": effnet.eval().requires_grad_(False)}
        self.dataset, self.unseen, self.semantic_noise = dataset, unseen, semantic_noise

    def pair(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic latents (B, 16, h, w) and target previews (B, 3, 8h, 8w) of pixels (B, 3, H, W)."""
        with torch.no_grad():
            latents = self.frozen["effnet"](for_encoder(pixels)).float()
        return latents, for_previewer(pixels)

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        latents, target = self.pair(self.dataset.images(self.dataset.draw(size, generator)))
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return {"latents": latents + self.semantic_noise * noise, "target": target}

    def forward(self, latents: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``latents`` (B, 16, h, w), ``target`` (B, 3, 8h, 8w) in 0..1."""
        return {"loss": (self.previewer(latents).float() - target).square().mean()}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        latents, target = self.pair(self.unseen.images(torch.arange(min(64, len(self.unseen)))))
        preview = self.previewer(latents).float().clamp(0, 1)
        return {"psnr": psnr(preview, target)}, grid([target[:8], preview[:8]])

    def save(self, folder: Path) -> None:
        self.previewer.save_pretrained(folder / "previewer")
