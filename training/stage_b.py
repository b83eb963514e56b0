"""The semantic encoder together with Stage B: what 16 channels at 1/42.67 must say so that Stage A's latents come back.

The encoder gets its gradient through Stage B alone in the authors' recipe, from an ImageNet backbone. From nothing, that signal
is too weak in the first thousands of steps, so a previewer is trained along with them and its pixel error reaches the encoder
too. A little noise on the semantic latents keeps them smooth: Stage C's small errors then stay small errors.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import alpha_sigma, log_snr, sample
from training.objective import keep_mask, p2_weight, pyramid_noise, sample_timesteps
from training.pictures import grid, resize
from training.scenes import Scenes
from training.trainer import Task


class StageBTask(Task):
    """Weighted epsilon error of Stage B, plus the previewer's pixel error; both reach the semantic encoder."""

    def __init__(
        self,
        decoder: StableCascadeUNet,
        effnet: SemanticEncoder,
        previewer: Previewer,
        *,
        vqgan: StageA,
        text_encoder: CLIPTextModelWithProjection,
        scenes: Scenes,
        unseen: Scenes,
        pyramid: float,
        semantic_noise: float,
        train_encoder: bool,
        preview_weight: float,
        p2_floor: float,
        drop_semantic: float,
        drop_text: float,
    ) -> None:
        super().__init__()
        self.decoder, self.effnet, self.previewer = decoder, effnet, previewer
        self.train_encoder = train_encoder
        if not train_encoder:
            effnet.requires_grad_(False)
            previewer.requires_grad_(False)
        self.frozen = {"vqgan": vqgan.eval().requires_grad_(False), "text": text_encoder.eval().requires_grad_(False)}
        self.scenes, self.unseen = scenes, unseen
        self.pyramid, self.semantic_noise = pyramid, semantic_noise
        self.preview_weight, self.p2_floor = preview_weight, p2_floor
        self.drop_semantic, self.drop_text = drop_semantic, drop_text

    def train(self, mode: bool = True) -> "StageBTask":
        super().train(mode)
        if not self.train_encoder:
            self.effnet.eval()
            self.previewer.eval()
        return self

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = self.scenes.draw(size, generator)
        pixels = self.scenes.images(indices)
        tokens, mask = self.scenes.tokens(indices, keep_mask(size, 1 - self.drop_text, generator))
        height, width = pixels.shape[-2:]
        small = resize(pixels, (height * 3 // 4, width * 3 // 4))
        channels = self.effnet.config.latent_channels
        return {
            "pixels": pixels,
            "small": small,
            "target": resize(pixels, (height * 3 // 16, width * 3 // 16)),
            "tokens": tokens,
            "mask": mask,
            "timesteps": sample_timesteps(size, generator),
            "noise": pyramid_noise((size, 4, height // 4, width // 4), generator, self.pyramid),
            "semantic_noise": self.semantic_noise
            * torch.randn(
                size, channels, small.shape[-2] // 32, small.shape[-1] // 32, generator=generator, device=pixels.device
            ),
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
        """``pixels`` (B, 3, H, W) and ``small`` (B, 3, 3H/4, 3W/4) in 0..1; ``noise`` like Stage A's latents."""
        with torch.no_grad():
            latents = self.frozen["vqgan"].encode(pixels).float()
            pooled = self.frozen["text"](input_ids=tokens, attention_mask=mask).text_embeds.unsqueeze(1)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in alpha_sigma(log_snr(timesteps)))
        semantic = self.effnet(small).float() + semantic_noise
        preview = (self.previewer(semantic).float() - target).square().mean()
        epsilon = self.decoder(
            alpha * latents + sigma * noise,
            timesteps,
            clip_text_pooled=pooled,
            effnet=semantic * keep_semantic.view(-1, 1, 1, 1),
        )
        errors = (epsilon.float() - noise).square().mean(dim=(1, 2, 3))
        weighted = (errors * p2_weight(timesteps, self.p2_floor)).mean()
        return {
            "loss": weighted + self.preview_weight * preview,
            "epsilon": errors.mean().detach(),
            "weighted": weighted.detach(),
            "preview": preview.detach(),
        }

    def restore(self, semantic: Tensor, pooled: Tensor, size: tuple[int, int], steps: int = 10) -> Tensor:
        """Pixels (B, 3, H, W) from semantic latents by Stage B and A, without guidance."""
        generator = torch.Generator(semantic.device).manual_seed(0)
        shape = (len(semantic), 4, size[0] // 4, size[1] // 4)

        def draw(_: int = 0) -> Tensor:
            return torch.randn(shape, generator=generator, device=semantic.device)

        conditions = self.decoder.condition(pooled, effnet=semantic, latent_size=shape[-2:])
        for step in sample(lambda x, t: self.decoder(x, t, conditions), draw(), steps=steps, shift=1.0, noise=draw):
            latents = step.x
        return self.frozen["vqgan"].decode(latents).float().clamp(0, 1)

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        indices = torch.arange(64)
        pixels = self.unseen.images(indices)
        tokens, mask = self.unseen.tokens(indices)
        pooled = self.frozen["text"](input_ids=tokens, attention_mask=mask).text_embeds.unsqueeze(1)
        height, width = pixels.shape[-2:]
        semantic = self.effnet(resize(pixels, (height * 3 // 4, width * 3 // 4))).float()
        restored = self.restore(semantic, pooled, (height, width))
        errors = (restored - pixels).square().mean(dim=(1, 2, 3))
        figures = {"psnr": (-10 * errors.log10()).mean().item(), "latent_std": semantic.std().item()}
        preview = nn.functional.interpolate(self.previewer(semantic[:8]).float(), size=(height, width))
        return figures, grid([pixels[:8], preview, restored[:8], pixels[8:16], restored[8:16]])

    def save(self, folder: Path) -> None:
        self.decoder.save_pretrained(folder / "decoder")
        self.effnet.save_pretrained(folder / "effnet")
        self.previewer.save_pretrained(folder / "previewer")
