"""Distillation of Stage C, see `distil`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.sampling import Noise, Step
from cascade.sizes import Size, semantic_size
from cascade.stages.prior import prior_steps
from cascade.weights import StageSettings
from training.dataset import Dataset
from training.objective import keep_mask
from training.pictures import normalise
from training.shapes import Shapes
from training.task import frozen
from training.tasks.distil import Distillation, Rank
from training.values import Count, Share


class DistilCTask(Distillation):
    """Stage C. For arguments, see `Distillation`.

    Args:
        drop_text: share of the captions that are replaced by the empty one.
        keep_image: share of the paths that have the image embedding of their picture; the others have zeros.
    """

    def __init__(
        self,
        *,
        prior: StableCascadeUNet,
        previewer: Previewer,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        settings: StageSettings,
        rank: Rank,
        paths: Count,
        substeps: Count,
        own: Share,
        drop_text: Share,
        keep_image: Share,
    ) -> None:
        super().__init__(
            "prior",
            prior,
            text_encoder=text_encoder,
            with_tokens=True,
            dataset=dataset,
            unseen=unseen,
            shapes=shapes,
            settings=settings,
            rank=rank,
            paths=paths,
            substeps=substeps,
            own=own,
        )
        self.networks |= frozen(previewer=previewer, image_encoder=image_encoder)
        self.drop_text, self.keep_image = drop_text, keep_image

    def known(self, dataset: Dataset, pictures: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
        encoder, device = self.networks["image_encoder"], generator.device
        kept = keep_mask(len(pictures), self.keep_image, generator)
        image = torch.zeros(len(pictures), 1, encoder.config.projection_dim, dtype=torch.float16, device=device)
        if kept.any():
            pixels = dataset.images(pictures[kept.cpu()], size)
            made = encoder(pixel_values=normalise(pixels, encoder.config.image_size)).image_embeds
            image[kept] = made.unsqueeze(1).half()
        keep = keep_mask(len(pictures), 1 - self.drop_text, generator)
        return {"rows": self.texts[dataset].rows(pictures.to(device), keep), "image": image}

    def conditions(self, dataset: Dataset, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        text, rows = self.texts[dataset], known["rows"]
        return {
            "clip_text": text.tokens[rows].float(),
            "clip_text_pooled": text.pooled[rows].float(),
            "clip_img": known["image"].float(),
        }

    def steps(
        self,
        network: StableCascadeUNet,
        conditions: Mapping[str, Tensor],
        size: Size,
        noise: Noise,
        settings: StageSettings,
    ) -> Iterator[Step]:
        text = self.texts[self.dataset]
        return prior_steps(
            network,
            TextEmbeddings(conditions["clip_text"], conditions["clip_text_pooled"]),
            TextEmbeddings(text.tokens[-1:].float(), text.pooled[-1:].float()),
            size=semantic_size(*size),
            noise=noise,
            image=conditions["clip_img"],
            **asdict(settings),
        )

    def shown(self, latents: Tensor) -> Tensor:
        return self.networks["previewer"](latents).float()
