"""Stage B by itself: Stage A's latents from semantic latents, with the semantic encoder as it is.

All that it learns from is encoded once, so a step costs Stage B alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import diffuse, finish, sample
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.latents import Encoded, stage_b_encoder
from training.objective import diffusion_losses, keep_mask, loss_weight, pyramid_noise, sample_timesteps
from training.pictures import grid, psnr
from training.shapes import Shapes
from training.trainer import Task
from training.values import Amount, Share


def paint(
    decoder: StableCascadeUNet, vqgan: StageA, semantic: Tensor, pooled: Tensor, size: tuple[int, int], steps: int = 10
) -> Tensor:
    """Pixels (B, 3, H, W) in 0..1 from semantic latents (B, 16, h, w) by Stages B and A, without guidance."""
    generator = torch.Generator(semantic.device).manual_seed(0)
    shape = (len(semantic), 4, size[0] // 4, size[1] // 4)

    def draw(_: int = 0) -> Tensor:
        return torch.randn(shape, generator=generator, device=semantic.device)

    conditions = decoder.condition(pooled, effnet=semantic, latent_size=shape[-2:])
    steps_made = sample(lambda x, t: decoder(x, t, conditions), draw(), steps=steps, shift=1.0, noise=draw)
    return vqgan.decode(finish(steps_made)).float().clamp(0, 1)


def repaint(
    decoder: StableCascadeUNet,
    *,
    effnet: SemanticEncoder,
    vqgan: StageA,
    text_encoder: CLIPTextModelWithProjection,
    unseen: Dataset,
) -> tuple[Tensor, Tensor, Tensor]:
    """Held-out pictures (B, 3, H, W), at most 64, their semantic latents (B, 16, h, w), and what Stages B and A make of those."""
    indices = torch.arange(min(64, len(unseen)))
    pixels = unseen.images(indices)
    tokens, mask = unseen.tokens(indices)
    pooled = text_encoder(input_ids=tokens, attention_mask=mask).text_embeds.unsqueeze(1)
    semantic = effnet(for_encoder(pixels)).float()
    return pixels, semantic, paint(decoder, vqgan, semantic, pooled, pixels.shape[-2:])


class StageBTask(Task):
    """Weighted epsilon error of Stage B."""

    def __init__(
        self,
        decoder: StableCascadeUNet,
        *,
        effnet: SemanticEncoder,
        vqgan: StageA,
        text_encoder: CLIPTextModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        weight: Mapping[str, Any],
        pyramid: Amount,
        semantic_noise: Amount,
        drop_semantic: Share,
        drop_text: Share,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.weight = loss_weight(**weight)
        self.pyramid, self.semantic_noise = pyramid, semantic_noise
        self.drop_semantic, self.drop_text = drop_semantic, drop_text
        self.data = Encoded(dataset, shapes, text_encoder, stage_b_encoder(vqgan, effnet))
        self.frozen = {"vqgan": vqgan.eval(), "effnet": effnet.eval(), "text_encoder": text_encoder.eval()}
        self.dataset, self.unseen = dataset, unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices, (latents, semantic) = self.data.draw(index, size, generator)
        count = len(indices)
        noise = torch.randn(semantic.shape, generator=generator, device=semantic.device)
        kept = keep_mask(count, 1 - self.drop_semantic, generator).view(-1, 1, 1, 1)
        rows = self.data.text.rows(indices, keep_mask(count, 1 - self.drop_text, generator))
        return {
            "latents": latents,
            "semantic": (semantic + self.semantic_noise * noise) * kept,
            "pooled": self.data.text.pooled[rows].float(),
            "timesteps": sample_timesteps(count, generator),
            "noise": pyramid_noise(tuple(latents.shape), generator, self.pyramid),
        }

    def forward(
        self, latents: Tensor, semantic: Tensor, pooled: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 4, H/4, W/4), ``semantic`` (B, 16, h, w), ``pooled`` (B, 1, D)."""
        epsilon = self.decoder(diffuse(latents, noise, timesteps), timesteps, clip_text_pooled=pooled, effnet=semantic)
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.weight.update(batch["timesteps"], outputs["errors"])

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        pixels, _, restored = repaint(self.decoder, unseen=self.unseen, **self.frozen)
        return {"psnr": psnr(restored, pixels)}, grid([pixels[:8], restored[:8], pixels[8:16], restored[8:16]])

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder / "decoder")
