"""Stage A: the autoencoder between pixels and 4 x H/4 x W/4 latents.

It is trained as a continuous autoencoder, because Stable Cascade does not quantise anything between encoder and decoder.
The encoder's last batch normalisation keeps every latent channel at unit variance. A little noise on the latents makes the
decoder robust against Stage B's small errors. The codebook is trained to follow the latents, so that the component is complete.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cascade.networks.stage_a import StageA
from training.dataset import Dataset
from training.pictures import grid, psnr
from training.task import Task
from training.values import Amount


class StageATask(Task):
    """Mean squared error of random crops, ``crop`` pixels a side, with ``latent_noise`` (a deviation) on the latents."""

    def __init__(self, vqgan: StageA, dataset: Dataset, unseen: Dataset, *, crop: int, latent_noise: Amount) -> None:
        super().__init__()
        self.vqgan = vqgan
        self.dataset, self.unseen = dataset, unseen
        self.crop, self.latent_noise = crop, latent_noise
        # Fixed, because a trained scale would only grow, until the latent noise has no effect.
        normalisation = vqgan.down_blocks[-1][1]
        nn.init.constant_(normalisation.weight, vqgan.config.scale_factor).requires_grad_(False)
        nn.init.zeros_(normalisation.bias).requires_grad_(False)

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = self.dataset.images(self.dataset.draw(size, generator))
        top, left = torch.randint(
            pixels.shape[-1] - self.crop + 1, (2,), generator=generator, device=generator.device
        ).tolist()
        pixels = pixels[:, :, top : top + self.crop, left : left + self.crop].contiguous()
        side = self.crop // 4
        noise = torch.randn(
            size, self.vqgan.config.latent_channels, side, side, generator=generator, device=pixels.device
        )
        return {"pixels": pixels, "noise": noise * self.latent_noise}

    def forward(self, pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """``pixels`` (B, 3, crop, crop) in 0..1, ``noise`` (B, 4, crop/4, crop/4)."""
        latents = self.vqgan.encode(pixels)
        restored = self.vqgan.decode(latents + noise)
        error = (restored.float() - pixels).square().mean()
        codes = self.vqgan.vquantizer.embedding.weight
        vectors = (
            latents.detach().float().permute(0, 2, 3, 1).reshape(-1, codes.shape[1])[:4096]
            * self.vqgan.config.scale_factor
        )
        codebook = torch.cdist(vectors, codes.float()).min(dim=1).values.square().mean()
        return {"loss": error + 0.01 * codebook, "pixels": error.detach(), "codebook": codebook.detach()}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        pixels = self.unseen.images(torch.arange(min(64, len(self.unseen))))
        restored = self.vqgan.decode(self.vqgan.encode(pixels)).float().clamp(0, 1)
        return {"psnr": psnr(restored, pixels)}, grid([pixels[:8], restored[:8]])

    def save(self, folder: Path) -> None:
        self.vqgan.save_pretrained(folder / "vqgan")
