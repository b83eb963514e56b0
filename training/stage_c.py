"""Stage C: captions to semantic latents.

Its targets are encoded once and kept on the training device, and so are the captions, so a step costs Stage C alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import diffuse, finish, guide, sample
from cascade.sizes import semantic_size
from training.dataset import Dataset
from training.latents import Encoded, stage_c_encoder
from training.objective import diffusion_losses, keep_mask, loss_weight, sample_timesteps
from training.pictures import grid
from training.shapes import Shapes
from training.trainer import Task


class StageCTask(Task):
    """Weighted epsilon error; the caption is dropped at times, the image embedding present only at times."""

    def __init__(
        self,
        prior: StableCascadeUNet,
        *,
        effnet: SemanticEncoder,
        previewer: Previewer,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        weight: Mapping[str, Any],
        drop_text: float,
        keep_image: float,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.weight = loss_weight(**weight)
        self.drop_text, self.keep_image = drop_text, keep_image
        encoder = stage_c_encoder(effnet, image_encoder)
        self.data = Encoded(dataset, shapes, text_encoder, encoder, with_tokens=True)
        self.frozen = {"text": text_encoder.eval(), "previewer": previewer.eval()}
        self.unseen = unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices, (latents, image) = self.data.draw(index, size, generator)
        count = len(indices)
        rows = self.data.text.rows(indices, keep_mask(count, 1 - self.drop_text, generator))
        return {
            "latents": latents,
            "image": image * keep_mask(count, self.keep_image, generator).view(-1, 1, 1),
            "text": self.data.text.tokens[rows].float(),
            "pooled": self.data.text.pooled[rows].float(),
            "timesteps": sample_timesteps(count, generator),
            "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
        }

    def forward(
        self, latents: Tensor, image: Tensor, text: Tensor, pooled: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 16, h, w), ``image`` and ``pooled`` (B, 1, D), ``text`` (B, 77, D)."""
        epsilon = self.prior(
            diffuse(latents, noise, timesteps), timesteps, clip_text_pooled=pooled, clip_text=text, clip_img=image
        )
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.weight.update(batch["timesteps"], outputs["errors"])

    def embed(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 77, D) before the final LayerNorm and pooled projection (B, 1, D), as Stage C takes them."""
        output = self.frozen["text"](input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-1], output.text_embeds.unsqueeze(1)

    def dream(self, tokens: Tensor, mask: Tensor, guidance: float = 4.0, steps: int = 20) -> Tensor:
        """Semantic latents (B, 16, h, w) for tokenised captions (B, 77), with the authors' sampler settings."""
        empty = self.unseen.empty(len(tokens))
        text, pooled = self.embed(torch.cat([tokens, empty[0]]), torch.cat([mask, empty[1]]))
        image = torch.zeros(len(text), 1, self.prior.config.clip_image_in_channels, device=text.device)
        conditions = self.prior.condition(pooled, clip_text=text, clip_img=image)
        generator = torch.Generator(text.device).manual_seed(0)
        shape = (len(tokens), self.prior.config.in_channels, *semantic_size(*self.unseen.size))

        def draw(_: int = 0) -> Tensor:
            return torch.randn(shape, generator=generator, device=text.device)

        def model(x: Tensor, t: Tensor) -> Tensor:
            cond, uncond = self.prior(torch.cat([x, x]), torch.cat([t, t]), conditions).float().chunk(2)
            return guide(cond, uncond, guidance, 0.7)

        return finish(sample(model, draw(), steps=steps, shift=2.0, noise=draw))

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        indices = torch.arange(min(16, len(self.unseen)))
        latents = self.dream(*self.unseen.tokens(indices))
        preview = self.frozen["previewer"](latents).float()
        pixels = self.unseen.images(indices)
        return {"latent_std": latents.std().item()}, grid([pixels[:8], preview[:8], pixels[8:], preview[8:]])

    def save(self, folder: Path) -> None:
        self.prior.save_pretrained(folder / "prior")
