"""Stage C: captions to semantic latents.

All pictures and captions are encoded once, so a step runs Stage C only.
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
from cascade.sampling import diffuse
from training.dataset import Dataset
from training.latents import Encoded, stage_c_encoder
from training.objective import diffusion_losses, keep_mask, loss_weight, sample_timesteps
from training.pictures import grid
from training.sampling import text_to_semantic
from training.shapes import Shapes
from training.task import DiffusionTask, fix_constant_conditions
from training.values import Share


def prior_batch(
    data: Encoded,
    index: int,
    size: int,
    generator: torch.Generator,
    *,
    drop_text: float,
    keep_image: float,
    image_alone: float = 0.0,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Stage C's arguments for micro-batch ``index``, and the remaining tensors of its pictures in ``data``.

    Args:
        data: each picture's semantic latents, CLIP image embedding, and further tensors.
        drop_text: share of the captions that are replaced by the empty one.
        keep_image: share of the image embeddings that are kept; the others are zeros.
        image_alone: share of the captions that are also replaced, among those whose image embedding is kept.

    Returns:
        ``latents`` and ``noise`` (B, 16, h, w), ``image`` and ``pooled`` (B, 1, D), ``text`` (B, 77, D), ``timesteps`` (B,); and
        the remaining tensors.
    """
    indices, (latents, image, *rest) = data.draw(index, size, generator)
    count = len(indices)
    with_text = keep_mask(count, 1 - drop_text, generator)
    with_image = keep_mask(count, keep_image, generator)
    if image_alone:
        with_text &= ~(with_image & keep_mask(count, image_alone, generator))
    rows = data.text.rows(indices, with_text)
    batch = {
        "latents": latents,
        "image": image * with_image.view(-1, 1, 1),
        "text": data.text.tokens[rows].float(),
        "pooled": data.text.pooled[rows].float(),
        "timesteps": sample_timesteps(count, generator),
        "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
    }
    return batch, tuple(rest)


class PriorTask(DiffusionTask):
    """Trains Stage C by its weighted epsilon error.

    Args:
        prior: Stage C.
        weight: how errors are weighted by timestep, see `objective.loss_weight`.
    """

    def __init__(self, prior: StableCascadeUNet, weight: Mapping[str, Any]) -> None:
        super().__init__()
        self.prior = fix_constant_conditions(prior)
        self.weight = loss_weight(**weight)

    def forward(
        self, latents: Tensor, image: Tensor, text: Tensor, pooled: Tensor, timesteps: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 16, h, w), ``image`` and ``pooled`` (B, 1, D), ``text`` (B, 77, D)."""
        epsilon = self.prior(
            diffuse(latents, noise, timesteps), timesteps, clip_text_pooled=pooled, clip_text=text, clip_img=image
        )
        return diffusion_losses(epsilon, noise, self.weight(timesteps))


class StageCTask(PriorTask):
    """Encodes pictures and captions at the start, and keeps them on the device. Drops captions and image embeddings at random.

    Args:
        prior, weight: see `PriorTask`.
        drop_text, keep_image, image_alone: see `prior_batch`.
    """

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
        drop_text: Share,
        keep_image: Share,
        image_alone: Share = 0.0,
    ) -> None:
        super().__init__(prior, weight)
        self.shares = {"drop_text": drop_text, "keep_image": keep_image, "image_alone": image_alone}
        encoder = stage_c_encoder(effnet, image_encoder)
        self.data = Encoded(dataset, shapes, text_encoder, encoder, with_tokens=True)
        self.frozen = {"text": text_encoder.eval(), "previewer": previewer.eval()}
        self.dataset, self.unseen = dataset, unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch, _ = prior_batch(self.data, index, size, generator, **self.shares)
        return batch

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Standard deviation of sampled latents, which should be 1; rows: pictures and previews of sampled latents, twice."""
        indices = torch.arange(min(16, len(self.unseen)))
        latents = text_to_semantic(self.prior, self.frozen["text"], self.unseen, indices)
        preview = self.frozen["previewer"](latents).float()
        pixels = self.unseen.images(indices)
        return {"latent_std": latents.std().item()}, grid([pixels[:8], preview[:8], pixels[8:], preview[8:]])

    def save(self, folder: Path) -> None:
        self.prior.save_pretrained(folder / "prior")
