"""The semantic encoder together with Stage B: 16 channels at 1/42.67 of the size, from which Stage B makes Stage A's latents.

In the authors' recipe the encoder starts from an ImageNet backbone, and its gradient comes through Stage B alone. From random
weights that signal is too weak for thousands of steps, so a previewer is trained too, and the encoder gets the gradient of its
pixel error. A little noise on the semantic latents keeps the decoding smooth, so that Stage C's small errors stay small.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import diffuse
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.objective import diffusion_losses, keep_mask, loss_weight, pyramid_noise, sample_timesteps
from training.pictures import for_previewer, grid, psnr
from training.task import DiffusionTask, fix_constant_conditions
from training.tasks.stage_b import repaint
from training.values import Amount, Share


class SemanticTask(DiffusionTask):
    """Weighted epsilon error of Stage B plus the previewer's pixel error; the semantic encoder gets the gradients of both.

    Args:
        weight, pyramid, semantic_noise, drop_semantic, drop_text: as `stage_b.StageBTask` has them.
        preview_weight: factor on the previewer's mean squared error.
    """

    def __init__(
        self,
        decoder: StableCascadeUNet,
        effnet: SemanticEncoder,
        previewer: Previewer,
        *,
        vqgan: StageA,
        text_encoder: CLIPTextModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        weight: Mapping[str, Any],
        pyramid: Amount,
        semantic_noise: Amount,
        preview_weight: Amount,
        drop_semantic: Share,
        drop_text: Share,
    ) -> None:
        super().__init__()
        self.decoder, self.effnet, self.previewer = fix_constant_conditions(decoder), effnet, previewer
        self.frozen = {
            "vqgan": vqgan.eval().requires_grad_(False),
            "text_encoder": text_encoder.eval().requires_grad_(False),
        }
        self.dataset, self.unseen = dataset, unseen
        self.weight = loss_weight(**weight)
        self.pyramid, self.semantic_noise, self.preview_weight = pyramid, semantic_noise, preview_weight
        self.drop_semantic, self.drop_text = drop_semantic, drop_text

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = self.dataset.draw(size, generator)
        pixels = self.dataset.images(indices)
        tokens, mask = self.dataset.tokens(indices, keep_mask(size, 1 - self.drop_text, generator))
        small = for_encoder(pixels)
        height, width = (side // 4 for side in pixels.shape[-2:])
        rows, columns = (side // 32 for side in small.shape[-2:])
        semantic_shape = (size, self.effnet.config.latent_channels, rows, columns)
        return {
            "pixels": pixels,
            "small": small,
            "target": for_previewer(pixels),
            "tokens": tokens,
            "mask": mask,
            "timesteps": sample_timesteps(size, generator),
            "noise": pyramid_noise((size, 4, height, width), generator, self.pyramid),
            "semantic_noise": self.semantic_noise
            * torch.randn(semantic_shape, generator=generator, device=pixels.device),
            "keep_semantic": keep_mask(size, 1 - self.drop_semantic, generator),
        }

    def forward(
        self,
        pixels: Tensor,
        small: Tensor,
        target: Tensor,
        tokens: Tensor,
        mask: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        semantic_noise: Tensor,
        keep_semantic: Tensor,
    ) -> dict[str, Tensor]:
        """In 0..1: ``pixels`` (B, 3, H, W), the encoder's input ``small`` (B, 3, 32h, 32w), previews ``target`` (B, 3, 8h, 8w).

        ``noise`` (B, 4, H/4, W/4), ``semantic_noise`` (B, 16, h, w), ``keep_semantic`` (B,).
        """
        with torch.no_grad():
            latents = self.frozen["vqgan"].encode(pixels).float()
            pooled = self.frozen["text_encoder"](input_ids=tokens, attention_mask=mask).text_embeds.unsqueeze(1)
        semantic = self.effnet(small).float() + semantic_noise
        preview = (self.previewer(semantic).float() - target).square().mean()
        epsilon = self.decoder(
            diffuse(latents, noise, timesteps),
            timesteps,
            clip_text_pooled=pooled,
            effnet=semantic * keep_semantic.view(-1, 1, 1, 1),
        )
        losses = diffusion_losses(epsilon, noise, self.weight(timesteps))
        return {**losses, "loss": losses["loss"] + self.preview_weight * preview, "preview": preview.detach()}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        pixels, semantic, restored = repaint(self.decoder, effnet=self.effnet, unseen=self.unseen, **self.frozen)
        figures = {"psnr": psnr(restored, pixels), "latent_std": semantic.std().item()}
        preview = nn.functional.interpolate(self.previewer(semantic[:8]).float(), size=pixels.shape[-2:])
        return figures, grid([pixels[:8], preview, restored[:8], pixels[8:16], restored[8:16]])

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder / "decoder")
        self.effnet.save_pretrained(folder / "effnet")
        self.previewer.save_pretrained(folder / "previewer")
