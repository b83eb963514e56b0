"""The IP-Adapter: a frozen Stage C learns to show what is in a reference image.

Only the adapter is trained, by Stage C's own error. The reference is not the picture itself, because the adapter would then
learn to copy layouts. It shows the same thing in another form, see `Dataset.references`. References pass the image encoder
once, and its hidden states are kept.

References are never dropped. Without one, as in the unconditional half of guidance, an adapter adds nothing, so a sample
without a reference would have no gradient.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter, image_tokens
from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.sampling import Noise, diffuse, finish
from cascade.sizes import semantic_size
from cascade.stages.encoder import for_encoder
from cascade.stages.prior import AdapterImage, prior_steps
from training.dataset import Dataset
from training.errors import TrainingError
from training.latents import BATCH, Encoded
from training.objective import diffusion_losses, keep_mask, loss_weight, sample_timesteps
from training.pictures import grid, normalise
from training.shapes import Shapes
from training.task import DiffusionTask, frozen
from training.values import Share

LOOKED_AT = 64
"""Held-out pictures of an evaluation."""


def new_ip_adapter(prior: StableCascadeUNet, image_encoder: CLIPVisionModelWithProjection, **sizes: Any) -> IPAdapter:
    """An untrained adapter, which changes nothing, with Stage C's own keys.

    Args:
        sizes: the arguments of `IPAdapter`.

    Raises:
        TrainingError: it would not fit Stage C or the image encoder.
    """
    adapter = IPAdapter(**sizes)
    check_fit(adapter, prior, image_encoder)
    adapter.copy_keys(prior)
    return adapter


def check_fit(adapter: IPAdapter, prior: StableCascadeUNet, image_encoder: CLIPVisionModelWithProjection) -> None:
    """Checks that an adapter fits Stage C and the image encoder.

    Raises:
        TrainingError: it does not.
    """
    wrong = adapter.misfit(prior, image_encoder.config.hidden_size)
    if wrong is not None:
        raise TrainingError(wrong)


def predict(
    prior: StableCascadeUNet,
    adapter: IPAdapter,
    noisy: Tensor,
    timesteps: Tensor,
    text: Tensor,
    pooled: Tensor,
    features: Tensor,
) -> Tensor:
    """Stage C's prediction of the noise in ``noisy`` latents (B, 16, h, w), with one reference a sample."""
    with torch.no_grad():
        conditions = prior.condition(pooled, clip_text=text)
    images = image_tokens(adapter(features), conditions)
    return prior(noisy, timesteps, conditions._replace(images=images, masks=(None,)))


class References:
    """The adapter's inputs for the references of a dataset's pictures, encoded once.

    Attributes:
        features: float16 (N, S, W), the image encoder's last hidden states but one, on the training device.
    """

    def __init__(self, dataset: Dataset, image_encoder: CLIPVisionModelWithProjection) -> None:
        self.image_encoder, self.side = image_encoder.eval(), image_encoder.config.image_size
        with (
            torch.no_grad(),
            torch.autocast(dataset.device.type, torch.bfloat16, enabled=dataset.device.type == "cuda"),
        ):
            parts = [self.encode(dataset.references(chosen)) for chosen in torch.arange(len(dataset)).split(BATCH)]
        self.features = torch.cat(parts)

    def encode(self, pixels: Tensor) -> Tensor:
        """Features, float16, of pixels (B, 3, H, W) in 0..1."""
        made = self.image_encoder(pixel_values=normalise(pixels, self.side), output_hidden_states=True)
        return made.hidden_states[-2].half()


class IPAdapterTask(DiffusionTask):
    """Weighted epsilon error of Stage C with the adapter's keys and values.

    Args:
        weight: how errors are weighted by timestep, see `objective.loss_weight`.
        drop_text: share of the captions that are replaced by the empty one, among the pictures whose reference shows the same
            thing.
    """

    def __init__(
        self,
        ip_adapter: IPAdapter,
        *,
        prior: StableCascadeUNet,
        effnet: SemanticEncoder,
        previewer: Previewer,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        weight: Mapping[str, Any],
        drop_text: Share,
    ) -> None:
        super().__init__()
        check_fit(ip_adapter, prior, image_encoder)
        self.ip_adapter = ip_adapter
        self.weight = loss_weight(**weight)
        self.drop_text = drop_text
        effnet = effnet.eval()
        self.data = Encoded(
            dataset, shapes, text_encoder, lambda pixels: (effnet(for_encoder(pixels)),), with_tokens=True
        )
        self.references = References(dataset, image_encoder)
        self.same = dataset.same_subject(torch.arange(len(dataset))).to(dataset.device)
        self.frozen = frozen(prior=prior, effnet=effnet, previewer=previewer, text=text_encoder)
        self.dataset, self.unseen = dataset, unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices, (latents,) = self.data.draw(index, size, generator)
        count = len(indices)
        keep = keep_mask(count, 1 - self.drop_text, generator) | ~self.same[indices]
        rows = self.data.text.rows(indices, keep)
        return {
            "latents": latents,
            "text": self.data.text.tokens[rows].float(),
            "pooled": self.data.text.pooled[rows].float(),
            "features": self.references.features[indices].float(),
            "timesteps": sample_timesteps(count, generator),
            "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
        }

    def forward(
        self, latents: Tensor, text: Tensor, pooled: Tensor, features: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents``, ``noise`` (B, 16, h, w); ``text`` (B, 77, D), ``pooled`` (B, 1, D); ``features`` (B, S, W)."""
        noisy = diffuse(latents, noise, timesteps)
        epsilon = predict(self.frozen["prior"], self.ip_adapter, noisy, timesteps, text, pooled, features)
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Epsilon errors on held-out pictures without captions, with the adapter and without; rows: references, and previews of
        latents sampled from them alone."""
        indices = torch.arange(min(LOOKED_AT, len(self.unseen)))
        seen = self.unseen.references(indices)
        features = self.references.encode(seen)
        latents = self.frozen["effnet"](for_encoder(self.unseen.images(indices))).float()
        generator = torch.Generator(latents.device).manual_seed(0)
        timesteps = sample_timesteps(len(indices), generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        empty = self._empty_text(len(indices))
        conditions = self.frozen["prior"].condition(empty.pooled, clip_text=empty.tokens)
        images = image_tokens(self.ip_adapter(features), conditions)
        figures = {}
        for name, one in (
            ("error", conditions._replace(images=images, masks=(None,))),
            ("error_without", conditions),
        ):
            epsilon = self.frozen["prior"](diffuse(latents, noise, timesteps), timesteps, one)
            figures[name] = (epsilon.float() - noise).square().mean().item()
        previews = self.frozen["previewer"](self._sample(features[:8])).float()
        return figures, grid([seen[:8], previews])

    def save(self, folder: Path) -> None:
        self.ip_adapter.save_pretrained(folder / "ip_adapter")

    def _empty_text(self, count: int) -> TextEmbeddings:
        ids, mask = self.unseen.empty(count)
        output = self.frozen["text"](input_ids=ids, attention_mask=mask, output_hidden_states=True)
        return TextEmbeddings(output.hidden_states[-1], output.text_embeds.unsqueeze(1))

    def _sample(self, features: Tensor) -> Tensor:
        """Semantic latents, float32 (B, 16, h, w), of references alone, with the authors' settings."""
        count = len(features)
        text, noise = self._empty_text(count), Noise(range(count), features.device)
        size = semantic_size(*self.unseen.size)
        adapter = (AdapterImage(self.ip_adapter(features)),)
        return finish(prior_steps(self.frozen["prior"], text, text, size=size, noise=noise, adapter=adapter))
