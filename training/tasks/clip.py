"""CLIP: a text and a vision tower whose embeddings say which caption belongs to which picture.

The published model uses two pretrained CLIPs (ViT-bigG/14 for text, ViT-L/14 for pictures). Here both towers are trained
together from random weights, with the contrastive loss of Radford et al., Learning Transferable Visual Models From Natural
Language Supervision, arXiv 2103.00020.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from training.dataset import Dataset
from training.pictures import grid, normalise
from training.task import Task


def factor(log_temperature: Tensor) -> Tensor:
    """The factor on cosines before the softmax, at most 100; its logarithm is learned."""
    return log_temperature.exp().clamp(max=100)


def contrast(text: Tensor, image: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy, and the share of captions whose nearest picture is their own.

    ``text`` and ``image`` (B, D) need not be normalised; row i of one belongs to row i of the other. ``factor``: see `factor`.
    """
    logits = normalize(text, dim=-1) @ normalize(image, dim=-1).T * factor
    target = torch.arange(len(logits), device=logits.device)
    loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(dim=1) == target).float().mean()


class ClipTask(Task):
    """Symmetric cross-entropy over the batch, with a learned temperature."""

    def __init__(
        self,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
    ) -> None:
        super().__init__()
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.dataset, self.unseen = dataset, unseen
        self.log_temperature = nn.Parameter(torch.tensor(1 / 0.07).log())

    def inputs(self, dataset: Dataset, indices: Tensor) -> dict[str, Tensor]:
        tokens, mask = dataset.tokens(indices)
        size = self.image_encoder.config.image_size
        pixels = normalise(dataset.images(indices, (size, size)), size)
        return {"tokens": tokens, "mask": mask, "pixels": pixels}

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        return self.inputs(self.dataset, self.dataset.draw_different(size, generator))

    def forward(self, tokens: Tensor, mask: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """``tokens`` and ``mask`` (B, 77), ``pixels`` (B, 3, S, S) normalised."""
        text = self.text_encoder(input_ids=tokens, attention_mask=mask).text_embeds.float()
        image = self.image_encoder(pixel_values=pixels).image_embeds.float()
        loss, accuracy = contrast(text, image, factor(self.log_temperature))
        return {"loss": loss, "accuracy": accuracy}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Loss and accuracy among up to 256 held-out pictures; none if there is only one. The sheet shows eight of them."""
        indices = torch.arange(min(256, len(self.unseen)))
        figures = {}
        if len(indices) > 1:
            outputs = self.forward(**self.inputs(self.unseen, indices))
            figures = {f"unseen_{name}": value.item() for name, value in outputs.items()}
        return figures, grid([self.unseen.images(indices[:8])])

    def save(self, folder: Path) -> None:
        self.text_encoder.save_pretrained(folder / "text_encoder")
        self.image_encoder.save_pretrained(folder / "image_encoder")
