"""Stage C on pictures that were encoded before, at any size of the network; it can be sharded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.weights.writing import save_component
from training.encoded.shards import EncodedPictures
from training.objective import keep_mask, sample_timesteps
from training.tasks.stage_c import PriorTask
from training.values import Share
from training.weights.fsdp import whole

EVALUATED = 16
"""Held-out pictures of an evaluation."""


class EncodedStageCTask(PriorTask):
    """Captions and image embeddings are dropped at random.

    Args:
        prior, weight: see `PriorTask`.
        pictures: the encoded pictures.
        drop_text: share of the captions that are replaced by the empty one.
        keep_image: share of the image embeddings that are kept; the others are zeros.
        recompute: share of the layers whose activations are computed again in the backward pass, instead of being kept.
    """

    def __init__(
        self,
        prior: StableCascadeUNet,
        pictures: EncodedPictures,
        *,
        weight: Mapping[str, Any],
        drop_text: Share,
        keep_image: Share,
        recompute: Share = 1.0,
    ) -> None:
        super().__init__(prior, weight)
        self.pictures, self.dataset, self.unseen = pictures, pictures, range(pictures.held_out)
        self.drop_text, self.keep_image = drop_text, keep_image
        prior.late_conditions = True
        if recompute:
            recompute_layers(prior, recompute)

    def units(self) -> Sequence[nn.Module]:
        return [block for block in self.prior.blocks() if isinstance(block, ResBlock | AttnBlock)]

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = self.pictures.draw(index, size, generator)
        with_text = keep_mask(size, 1 - self.drop_text, generator).view(-1, 1, 1)
        with_image = keep_mask(size, self.keep_image, generator).view(-1, 1, 1)
        latents = drawn["latents"]
        return {
            "latents": latents,
            "image": drawn["image"] * with_image,
            "text": torch.where(with_text, drawn["text"], self.pictures.empty["text"]),
            "pooled": torch.where(with_text, drawn["pooled"], self.pictures.empty["pooled"]),
            "timesteps": sample_timesteps(size, generator),
            "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
        }

    def evaluate(self) -> tuple[dict[str, float], None]:
        """The mean error of at most 16 held-out pictures, see `error_of`."""
        batches = self.pictures.unseen(EVALUATED)
        without_image = [{**batch, "image": torch.zeros_like(batch["image"])} for batch in batches]
        return {"error": self.error_of(without_image)}, None

    def save(self, folder: Path) -> None:
        """Writes Stage C in bfloat16, as the published one."""
        network = whole(self.prior)
        if network is not None:
            save_component(folder / "prior", network, torch.bfloat16)


def recompute_layers(prior: StableCascadeUNet, share: float) -> None:
    """Turns on gradient checkpointing for a share of the layers, evenly distributed."""
    chosen: set[nn.Module] = set()
    layers = -1
    for block in prior.blocks():
        layers += isinstance(block, ResBlock)  # the first block of a layer
        # A TimestepBlock keeps nothing that its neighbours do not keep.
        if int((layers + 1) * share) > int(layers * share) and isinstance(block, ResBlock | AttnBlock):
            chosen.add(block)

    def run(block: nn.Module, *arguments: Any) -> Any:
        if block not in chosen:
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False)

    prior.enable_gradient_checkpointing(run)
