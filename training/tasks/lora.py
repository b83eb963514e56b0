"""Trains a LoRA of Stage C, and optionally one of the text encoder and a new word. All other weights are frozen.

Pictures and, unless they change, captions are encoded once. The networks are not sub-modules of the task, so that checkpoints
hold only trained parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import diffuse
from cascade.weights import StageSettings
from training.lora.data import Latents, Texts, sample_latents
from training.objective import P2Weight, diffusion_losses, keep_mask, sample_timesteps
from training.pictures import grid
from training.task import DiffusionTask, draws

EVALUATED = 16
"""Pictures of which evaluations measure the error."""


class LoraTask(DiffusionTask):
    """The epsilon error with P2 weights, as the authors train LoRAs.

    Args:
        prior: Stage C with its LoRA, on the training device.
        trained: all parameters to be trained, by name.
        text: the captions; the empty one last.
        latents: the pictures.
        preserved: pictures for prior preservation; None: there are none.
        preserve_share: share of the micro-batches that are of `preserved`.
        caption_dropout: share of the samples without a caption.
        samples: rows of the captions of which evaluations make pictures.
        resolution: pixels of a side of these.
        settings: of their sampler.
        previewer: turns their latents into pictures; None: evaluations make none.
        write: writes the file into a folder.
        modes: further networks that have a training mode.
        compiled_by: the setting that let blocks of Stage C be compiled; None if they are not.
    """

    def __init__(
        self,
        prior: StableCascadeUNet,
        trained: Mapping[str, nn.Parameter],
        *,
        text: Texts,
        latents: Latents,
        preserved: Latents | None = None,
        preserve_share: float = 0.0,
        caption_dropout: float = 0.05,
        samples: Sequence[int] = (),
        resolution: int,
        settings: StageSettings,
        previewer: Previewer | None = None,
        write: Callable[[Path], None],
        modes: Sequence[nn.Module] = (),
        compiled_by: str | None = None,
    ) -> None:
        super().__init__()
        self.compiled_by = compiled_by
        self.trained = nn.ParameterDict({name.replace(".", "/"): value for name, value in trained.items()})
        self.networks = {"prior": prior, "previewer": previewer}
        self.modes = [prior, *modes]
        self.texts, self.latents, self.preserved = text, latents, preserved
        self.preserve_share, self.caption_dropout = preserve_share, caption_dropout
        self.samples, self.resolution, self.settings = tuple(samples), resolution, settings
        self.write = write
        self.weight = P2Weight()

    def train(self, mode: bool = True) -> "LoraTask":
        for network in self.modes:
            network.train(mode)
        return super().train(mode)

    def repeats(self) -> bool:
        return super().repeats() and not any(draws(network) for network in self.modes)

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        share = torch.rand((), generator=torch.Generator().manual_seed(generator.initial_seed())).item()
        source = self.preserved if self.preserved is not None and share < self.preserve_share else self.latents
        latents, rows = source.draw(size, generator)
        keep = keep_mask(size, 1 - self.caption_dropout, generator)
        return {
            "latents": latents,
            "rows": torch.where(keep, rows, self.texts.empty),
            "timesteps": sample_timesteps(size, generator),
            "noise": torch.randn(latents.shape, generator=generator, device=latents.device),
        }

    def forward(self, latents: Tensor, rows: Tensor, timesteps: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """``latents`` and ``noise`` (B, 16, h, w); ``rows`` (B,), of the captions; ``timesteps`` (B,)."""
        text = self.texts.rows(rows)
        epsilon = self.networks["prior"](
            diffuse(latents, noise, timesteps), timesteps, clip_text_pooled=text.pooled, clip_text=text.tokens
        )
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """The mean error of at most 16 pictures, see `error_of`; the samples."""
        batches, left = [], EVALUATED
        for latents, rows in self.latents.groups:
            if left > 0:
                batches.append({"latents": latents[:left], "rows": rows[:left]})
            left -= len(rows)
        return {"error": self.error_of(batches)}, self._sheet()

    def _sheet(self) -> Image.Image | None:
        previewer = self.networks["previewer"]
        if not self.samples or previewer is None:
            return None
        device = next(iter(self.trained.values())).device
        rows = torch.tensor([*self.samples, self.texts.empty], device=device)
        text = self.texts.rows(rows)
        prompts, empty = (type(text)(text.tokens[part], text.pooled[part]) for part in (slice(-1), slice(-1, None)))
        seeds = range(len(self.samples))
        options = {"resolution": self.resolution, "settings": self.settings}
        made = sample_latents(self.networks["prior"], prompts, empty, seeds=seeds, **options)
        previews = previewer(made).float()
        return grid([previews[first : first + 4] for first in range(0, len(previews), 4)])

    def save(self, folder: Path) -> None:
        self.write(folder)
