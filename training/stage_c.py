"""Stage C: the text-conditioned prior over the semantic latents.

Everything but Stage C is finished and frozen by now, so each scene's semantic latents and image embedding are computed once,
before the first step; a step then costs Stage C and the text encoder alone.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import alpha_sigma, guide, log_snr, sample
from training.clip import normalise
from training.objective import keep_mask, p2_weight, sample_timesteps
from training.pictures import grid, resize
from training.scenes import Scenes
from training.trainer import Task


@torch.no_grad()
def encode_scenes(
    scenes: Scenes, effnet: SemanticEncoder, image_encoder: CLIPVisionModelWithProjection, batch: int = 512
) -> tuple[Tensor, Tensor]:
    """Semantic latents (N, 16, h, w) and image embeddings (N, 1, D) of all ``scenes``, as float16 on their device."""
    latents, embeddings = [], []
    for indices in torch.arange(len(scenes)).split(batch):
        pixels = scenes.images(indices)
        height, width = pixels.shape[-2:]
        latents.append(effnet(resize(pixels, (height * 3 // 4, width * 3 // 4))).half())
        small = normalise(pixels, image_encoder.config.image_size)
        embeddings.append(image_encoder(pixel_values=small).image_embeds.unsqueeze(1).half())
    return torch.cat(latents), torch.cat(embeddings)


class StageCTask(Task):
    """P2-weighted epsilon error; the caption is dropped at times, the image embedding present only at times."""

    def __init__(
        self,
        prior: StableCascadeUNet,
        *,
        effnet: SemanticEncoder,
        previewer: Previewer,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        scenes: Scenes,
        unseen: Scenes,
        p2_floor: float,
        drop_text: float,
        keep_image: float,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.frozen = {
            "text": text_encoder.eval().requires_grad_(False),
            "previewer": previewer.eval().requires_grad_(False),
        }
        self.scenes, self.unseen = scenes, unseen
        self.p2_floor, self.drop_text, self.keep_image = p2_floor, drop_text, keep_image
        with torch.autocast(scenes.device.type, torch.bfloat16, enabled=scenes.device.type == "cuda"):
            self.latents, self.embeddings = encode_scenes(scenes, effnet.eval(), image_encoder.eval())

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = self.scenes.draw(size, generator)
        tokens, mask = self.scenes.tokens(indices, keep_mask(size, 1 - self.drop_text, generator))
        latents = self.latents[indices.to(self.latents.device)].float()
        kept = keep_mask(size, self.keep_image, generator).view(-1, 1, 1)
        return {
            "latents": latents,
            "image": self.embeddings[indices.to(self.latents.device)].float() * kept,
            "tokens": tokens,
            "mask": mask,
            "timesteps": sample_timesteps(size, generator),
            "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
        }

    def embed(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 77, D) before the final LayerNorm and pooled projection (B, 1, D), as Stage C takes them."""
        output = self.frozen["text"](input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-1], output.text_embeds.unsqueeze(1)

    def forward(
        self, latents: Tensor, image: Tensor, tokens: Tensor, mask: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 16, h, w), ``image`` (B, 1, D), ``tokens`` and ``mask`` (B, 77)."""
        with torch.no_grad():
            text, pooled = self.embed(tokens, mask)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in alpha_sigma(log_snr(timesteps)))
        epsilon = self.prior(
            alpha * latents + sigma * noise, timesteps, clip_text_pooled=pooled, clip_text=text, clip_img=image
        )
        errors = (epsilon.float() - noise).square().mean(dim=(1, 2, 3))
        loss = (errors * p2_weight(timesteps, self.p2_floor)).mean()
        return {"loss": loss, "epsilon": errors.mean().detach()}

    def dream(self, tokens: Tensor, mask: Tensor, guidance: float = 4.0, steps: int = 20) -> Tensor:
        """Semantic latents (B, 16, h, w) for tokenised captions (B, 77), with the authors' sampler settings."""
        empty = self.unseen.empty(len(tokens))
        text, pooled = self.embed(torch.cat([tokens, empty[0]]), torch.cat([mask, empty[1]]))
        image = torch.zeros(len(text), 1, self.embeddings.shape[-1], device=text.device)
        conditions = self.prior.condition(pooled, clip_text=text, clip_img=image)
        generator = torch.Generator(text.device).manual_seed(0)
        shape = (len(tokens), *self.latents.shape[1:])

        def draw(_: int = 0) -> Tensor:
            return torch.randn(shape, generator=generator, device=text.device)

        def model(x: Tensor, t: Tensor) -> Tensor:
            cond, uncond = self.prior(torch.cat([x, x]), torch.cat([t, t]), conditions).float().chunk(2)
            return guide(cond, uncond, guidance, 0.7)

        for step in sample(model, draw(), steps=steps, shift=2.0, noise=draw):
            latents = step.x
        return latents

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        indices = torch.arange(16)
        latents = self.dream(*self.unseen.tokens(indices))
        preview = self.frozen["previewer"](latents).float()
        pixels = self.unseen.images(indices)
        return {"latent_std": latents.std().item()}, grid([pixels[:8], preview[:8], pixels[8:], preview[8:]])

    def save(self, folder: Path) -> None:
        self.prior.save_pretrained(folder / "prior")
