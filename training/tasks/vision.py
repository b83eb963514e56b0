"""The vision tower alone, trained further to tell objects apart.

CLIP's contrastive loss asks which caption of a batch belongs to a picture. For composed scenes, the background and the place
mostly suffice to answer that, so the tower learns little about objects. Here a second loss asks which of all names each
picture shows: zero-shot classification. The text tower is frozen, because Stages B and C learn from it.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from training.dataset import Dataset
from training.errors import TrainingError
from training.latents import TextTable
from training.pictures import grid, normalise
from training.task import Task
from training.tasks.clip import contrast, factor
from training.values import Amount

AMONG = 5


class VisionTask(Task):
    """Symmetric cross-entropy of pictures and captions, plus cross-entropy of names, each with a learned temperature.

    Args:
        image_encoder: the vision tower, which is trained.
        text_encoder: the text tower, which is frozen.
        dataset, unseen: with names, see `Dataset.names`.
        naming: factor on the names' loss.

    Raises:
        TrainingError: the dataset has no names, and ``naming`` is not 0.
    """

    def __init__(
        self,
        image_encoder: CLIPVisionModelWithProjection,
        *,
        text_encoder: CLIPTextModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        naming: Amount,
    ) -> None:
        super().__init__()
        if naming and not dataset.names:
            raise TrainingError(f"naming is {naming}, but the data have no names; without names it must be 0.")
        self.image_encoder, self.naming = image_encoder, naming
        self.dataset, self.unseen = dataset, unseen
        self.side = image_encoder.config.image_size
        with torch.no_grad():
            text_encoder.eval()
            self.captions = TextTable(dataset, text_encoder, with_tokens=False).pooled[:-1, 0]
            if naming:
                ids, mask = (value.long() for value in dataset.tokenise(dataset.names))
                names = text_encoder(input_ids=ids, attention_mask=mask).text_embeds.float()
                self.register_buffer("names", normalize(names, dim=-1), persistent=False)
        self.log_temperatures = nn.Parameter(torch.full((2,), 1 / 0.07).log())

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = self.dataset.draw_different(size, generator)
        return {
            "pixels": self._pixels(self.dataset, indices),
            "text": self.captions[indices.to(self.captions.device)].float(),
            "shown": self.dataset.shown(indices).float(),
        }

    def forward(self, pixels: Tensor, text: Tensor, shown: Tensor) -> dict[str, Tensor]:
        """``pixels`` (B, 3, S, S), normalised; ``text`` (B, D), embeddings; ``shown`` (B, names), 1 for each name shown."""
        captions, names = factor(self.log_temperatures)
        image = normalize(self.image_encoder(pixel_values=pixels).image_embeds.float(), dim=-1)
        contrasted, _ = contrast(text, image, captions)
        if not self.naming:
            return {"loss": contrasted, "contrast": contrasted}
        named = cross_entropy(image @ self.names.T * names, normalize(shown, p=1, dim=-1))
        return {"loss": contrasted + self.naming * named, "contrast": contrasted, "named": named}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Top-5 accuracy: the share of objects on held-out pictures whose name is among the five nearest."""
        indices = torch.arange(min(512, len(self.unseen)))
        figures = {}
        if self.naming:
            image = self.image_encoder(pixel_values=self._pixels(self.unseen, indices)).image_embeds.float()
            likeness, shown = normalize(image, dim=-1) @ self.names.T, self.unseen.shown(indices)
            pictures, _ = shown.nonzero().unbind(dim=1)
            others = likeness.masked_fill(shown, -torch.inf)[pictures]
            nearer = (others > likeness[shown][:, None]).sum(dim=1)
            figures[f"named_in_{AMONG}"] = (nearer < AMONG).float().mean().item()
        return figures, grid([self.unseen.images(indices[:8]), self.unseen.images(indices[8:16])])

    def save(self, folder: Path) -> None:
        self.image_encoder.save_pretrained(folder / "image_encoder")

    def _pixels(self, dataset: Dataset, indices: Tensor) -> Tensor:
        return normalise(dataset.images(indices, (self.side, self.side)), self.side)
