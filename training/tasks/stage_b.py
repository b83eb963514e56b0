"""Stage B alone: Stage A's latents from semantic latents; the semantic encoder is frozen.

All pictures are encoded once, so a step runs Stage B only.
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
from cascade.networks.unet import StableCascadeUNet, resize
from cascade.sampling import diffuse
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.latents import Encoded, at_scale, semantic_encoder, stage_b_encoder
from training.objective import diffusion_losses, keep_mask, loss_weight, pyramid_noise, sample_timesteps
from training.pictures import grid, psnr
from training.sampling import semantic_to_pixels
from training.shapes import Shapes
from training.task import DiffusionTask, fix_constant_conditions
from training.values import Amount, Share

SCALES = (32.0, 36.6, 51.2, 64.0)
"""Pixels of one semantic latent, besides the usual 42.67; 256 pixels have 8, 7, 5 or 4 such latents. The range is that of the
authors' training, which encodes pictures at 0.5 to 1 of their size (``train/train_b.py``)."""


def repaint(
    decoder: StableCascadeUNet,
    *,
    effnet: SemanticEncoder,
    vqgan: StageA,
    text_encoder: CLIPTextModelWithProjection,
    unseen: Dataset,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Paints held-out pictures, at most 64, from their semantic latents.

    Args:
        scale: pixels of a semantic latent; None: 42.67.

    Returns:
        The pictures (B, 3, H, W), their semantic latents (B, 16, h, w), and what Stages B and A make of these.
    """
    indices = torch.arange(min(64, len(unseen)))
    pixels = unseen.images(indices)
    tokens, mask = unseen.tokens(indices)
    pooled = text_encoder(input_ids=tokens, attention_mask=mask).text_embeds.unsqueeze(1)
    semantic = effnet(for_encoder(pixels) if scale is None else at_scale(pixels, scale)).float()
    return pixels, semantic, semantic_to_pixels(decoder, vqgan, semantic, pooled, pixels.shape[-2:])


class StageBTask(DiffusionTask):
    """Weighted epsilon error of Stage B.

    Args:
        weight: how errors are weighted by timestep, see `objective.loss_weight`.
        pyramid: share of coarse noise, see `objective.pyramid_noise`.
        semantic_noise: standard deviation of the noise that is added to semantic latents.
        drop_semantic, drop_text: share of samples without semantic latents, or without a caption.
        other_scales: share of the batches whose semantic latents have one of `SCALES`.
    """

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
        other_scales: Share = 0.0,
    ) -> None:
        super().__init__()
        self.decoder = fix_constant_conditions(decoder)
        self.weight = loss_weight(**weight)
        self.pyramid, self.semantic_noise = pyramid, semantic_noise
        self.drop_semantic, self.drop_text = drop_semantic, drop_text
        self.other_scales = other_scales
        more = [semantic_encoder(effnet, scale) for scale in SCALES] if other_scales else []
        self.data = Encoded(dataset, shapes, text_encoder, stage_b_encoder(vqgan, effnet), more=more)
        self.frozen = {"vqgan": vqgan.eval(), "effnet": effnet.eval(), "text_encoder": text_encoder.eval()}
        self.dataset, self.unseen = dataset, unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices, (latents, *semantics) = self.data.draw(index, size, generator, self._scale(generator))
        semantic, count = semantics[-1], len(indices)
        noise = torch.randn(semantic.shape, generator=generator, device=semantic.device)
        kept = keep_mask(count, 1 - self.drop_semantic, generator).view(-1, 1, 1, 1)
        rows = self.data.text.rows(indices, keep_mask(count, 1 - self.drop_text, generator))
        # Enlarged as the network would do it: so all scales have one shape, and it is compiled once.
        patches = [side // self.decoder.config.patch_size for side in latents.shape[-2:]]
        return {
            "latents": latents,
            "semantic": resize((semantic + self.semantic_noise * noise) * kept, patches),
            "pooled": self.data.text.pooled[rows].float(),
            "timesteps": sample_timesteps(count, generator),
            "noise": pyramid_noise(tuple(latents.shape), generator, self.pyramid),
        }

    def _scale(self, generator: torch.Generator) -> int | None:
        """The place in `SCALES` of a batch's scale; None: 42.67 pixels. Drawn on the CPU, so nothing waits for the GPU."""
        own = torch.Generator().manual_seed(generator.initial_seed())
        share, place = torch.rand(2, generator=own).tolist()
        return int(place * len(SCALES)) if share < self.other_scales else None

    def forward(
        self, latents: Tensor, semantic: Tensor, pooled: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 4, H/4, W/4), ``semantic`` (B, 16, H/8, W/8), ``pooled`` (B, 1, D)."""
        epsilon = self.decoder(diffuse(latents, noise, timesteps), timesteps, clip_text_pooled=pooled, effnet=semantic)
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """PSNR in dB of repainted pictures, at 42.67 pixels a latent and at the ends of `SCALES`; rows: true, repainted."""
        pixels, _, restored = repaint(self.decoder, unseen=self.unseen, **self.frozen)
        figures = {"psnr": psnr(restored, pixels)}
        for scale in (SCALES[0], SCALES[-1]) if self.other_scales else ():
            _, _, other = repaint(self.decoder, unseen=self.unseen, scale=scale, **self.frozen)
            figures[f"psnr_{scale:g}"] = psnr(other, pixels)
        return figures, grid([pixels[:8], restored[:8], pixels[8:16], restored[8:16]])

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder / "decoder")
