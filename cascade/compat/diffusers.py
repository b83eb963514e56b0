"""The pictures of the two Stable Cascade pipelines that diffusers has frozen, chained. docs/comparison.md says in what they
differ from the authors'."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cascade import sizes
from cascade.guides.controls import Control
from cascade.limits import MODELS_OWN
from cascade.pipeline import Cascade
from cascade.plan import Planner
from cascade.request import Request
from cascade.sampling import Sampling
from cascade.weights import StageSettings

# diffusers derives Stage B's size from the semantic one with this factor.
FACTOR = 10.67


class DiffusersPlanner(Planner):
    """diffusers' sizes. It has text-to-image and image prompts alone."""

    def check_networks(self, request: Request, controls: Sequence[Control], size: sizes.Size) -> None:
        for name, only in (("sampler", "ddpm"), ("speed", "exact")):
            value = getattr(request, name)
            if value not in (MODELS_OWN, only):
                raise ValueError(f"{name} is {value!r}; diffusers' numerics have {only!r} only.")
        if request.image is not None:
            raise ValueError("There is an image to begin with; diffusers' numerics have no image-to-image.")
        if controls:
            raise ValueError("There are controls; diffusers' numerics have no ControlNet.")
        if request.compression != sizes.SEMANTIC_PIXELS:
            raise ValueError(
                f"compression is {request.compression}; diffusers' numerics have {sizes.SEMANTIC_PIXELS} only."
            )
        super().check_networks(request, controls, size)

    def latent_sizes(
        self, size: sizes.Size, compression: float = sizes.SEMANTIC_PIXELS
    ) -> tuple[sizes.Size, sizes.Size, sizes.Size]:
        """Stage B's latents are 10.67 times the semantic ones, and pictures as large as that makes them."""
        semantic = sizes.semantic_size(*size, compression)
        decoder = decoder_size(semantic)
        height, width = (side * sizes.STAGE_A_FACTOR for side in decoder)
        return semantic, decoder, (height, width)


def decoder_size(semantic: sizes.Size) -> sizes.Size:
    """Stage B's latents as diffusers derives them from the semantic size.

    Raises:
        ValueError: a side is odd, which Stage B can't take; diffusers fails there too.
    """
    height, width = (int(side * FACTOR) for side in semantic)
    if height % 2 or width % 2:
        raise ValueError(
            f"In diffusers' numerics, {semantic[0]}x{semantic[1]} semantic latents make {height}x{width} decoder "
            "latents; both sides must be even."
        )
    return height, width


def posterior_step(x: Tensor, eps: Tensor, log_snr: Tensor, next_log_snr: Tensor, noise: Tensor) -> Tensor:
    """One step of diffusers' DDPMWuerstchenScheduler: the mean of q(x_next | x, x0) (Ho et al., arXiv 2006.11239, eq. 11).

    Equal to `sampling.ddpm_step` but for rounding; arguments as there.
    """
    remaining, next_remaining = torch.sigmoid(log_snr), torch.sigmoid(next_log_snr)
    ratio = remaining / next_remaining
    mean = (x - (1 - ratio) / (1 - remaining).sqrt() * eps) / ratio.sqrt()
    return mean + ((1 - ratio) * (1 - next_remaining) / (1 - remaining)).sqrt() * noise


class DiffusersSampling(Sampling):
    """Steps as diffusers' scheduler takes them: the model is told the time itself, not the one that belongs to the clamped and
    shifted logSNR, and the last step adds no noise."""

    def timesteps(self, times: Tensor) -> Tensor:
        return times

    def moved(self, x0: Tensor, eps: Tensor) -> Tensor:
        drawn = self.noise(self.index).to(self.x)
        added = drawn if self.index < self.total - 1 else torch.zeros_like(self.x)
        return posterior_step(self.x, eps, *self.log_snrs[self.index : self.index + 2], added)


class DiffusersCascade(Cascade):
    """A `Cascade` with diffusers' numerics: no shift, no rescale, no guidance in Stage B unless it is asked for, and Stage A's
    scale as its configuration says, which is wrong in the published one."""

    planner_class = DiffusersPlanner
    sampling_class = DiffusersSampling

    def __init__(self, *parts: Any, defaults: Mapping[str, StageSettings], **options: Any) -> None:
        plain = {
            stage: replace(settings, shift=1.0, rescale=0.0, sampler="ddpm") for stage, settings in defaults.items()
        }
        plain["decoder"] = replace(plain["decoder"], guidance=0.0)
        super().__init__(*parts, defaults=plain, **{**options, "stage_a_scale": None})
