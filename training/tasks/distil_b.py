"""Distillation of Stage B, see `distil`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import Noise, Step
from cascade.sizes import Size, decoder_size
from cascade.stages.decoder import decoder_steps
from cascade.stages.encoder import for_encoder
from cascade.stages.pixels import decode_pixels
from cascade.weights import StageSettings
from training.dataset import Dataset
from training.shapes import Shapes
from training.task import frozen
from training.tasks.distil import Distillation, Rank
from training.values import Amount, Count, Share


class DistilBTask(Distillation):
    """Stage B. For arguments, see `Distillation`.

    Args:
        semantic_noise: standard deviation of the noise that is added to the pictures' semantic latents.
    """

    def __init__(
        self,
        *,
        decoder: StableCascadeUNet,
        effnet: SemanticEncoder,
        vqgan: StageA,
        text_encoder: CLIPTextModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        settings: StageSettings,
        rank: Rank,
        paths: Count,
        substeps: Count,
        own: Share,
        semantic_noise: Amount,
    ) -> None:
        super().__init__(
            "decoder",
            decoder,
            text_encoder=text_encoder,
            with_tokens=False,
            dataset=dataset,
            unseen=unseen,
            shapes=shapes,
            settings=settings,
            rank=rank,
            paths=paths,
            substeps=substeps,
            own=own,
        )
        self.networks |= frozen(effnet=effnet, vqgan=vqgan)
        self.semantic_noise = semantic_noise

    def known(self, dataset: Dataset, pictures: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
        semantic = self.networks["effnet"](for_encoder(dataset.images(pictures, size))).float()
        noise = torch.randn(semantic.shape, generator=generator, device=semantic.device)
        return {"rows": pictures.to(semantic.device), "semantic": (semantic + self.semantic_noise * noise).half()}

    def conditions(self, dataset: Dataset, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pooled = self.texts[dataset].pooled[known["rows"]]
        return {"clip_text_pooled": pooled.float(), "effnet": known["semantic"].float()}

    def steps(
        self,
        network: StableCascadeUNet,
        conditions: Mapping[str, Tensor],
        size: Size,
        noise: Noise,
        settings: StageSettings,
    ) -> Iterator[Step]:
        return decoder_steps(
            network,
            conditions["effnet"],
            conditions["clip_text_pooled"],
            self.texts[self.dataset].pooled[-1:].float(),
            size=decoder_size(*size),
            noise=noise,
            **asdict(settings),
        )

    def shown(self, latents: Tensor) -> Tensor:
        return torch.stack(list(decode_pixels(self.networks["vqgan"], latents)))
