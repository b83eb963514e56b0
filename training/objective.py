"""What a diffusion stage of Stable Cascade is trained to do: the noise it sees, the timesteps, and how much each error counts.

Pure tensor maths in float32. Every random draw takes a generator, so that a step can be repeated exactly.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cascade.sampling import log_snr
from training.values import Amount, Count, Share


def sample_timesteps(batch: int, generator: torch.Generator) -> Tensor:
    """Timesteps (batch,), float32 in [0.001, 1], uniform as in the authors' training: ``(1 - u) + 0.001`` clamped."""
    uniform = torch.rand(batch, generator=generator, device=generator.device)
    return (1 - uniform + 0.001).clamp(0.001, 1.0)


class P2Weight(nn.Module):
    """Weight of the epsilon error: ``1 / (k + SNR) + floor``.

    Source: Choi et al., Perception Prioritized Training of Diffusion Models (gamma = 1); the authors of Stable Cascade use
    k = 1. Smaller k matters where sampling has few steps: the first one magnifies Stage B's error at t = 1 some fifteen
    times. After 8,000 steps with k = 1, what the miniature's Stage B took for the picture at t = 1 was worse than gray
    (error 1.5, in deviations of the latents), while at t = 0.9 it was 0.34. The floor keeps the last, nearly noiseless
    steps from being forgotten.
    """

    def __init__(self, k: Amount = 1.0, floor: Amount = 0.0) -> None:
        super().__init__()
        self.k, self.floor = k, floor

    def forward(self, timesteps: Tensor) -> Tensor:
        """Weights (batch,) for float32 timesteps (batch,) in [0, 1]."""
        return 1 / (self.k + log_snr(timesteps).exp()) + self.floor

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Nothing: this weight follows no loss."""


class AdaptiveLossWeight(nn.Module):
    """The authors' adaptive weight: one over the running mean of the loss in the same bucket of logSNR.

    ``buckets - 1`` edges are spread evenly over logSNR -10 to 10. :meth:`update` averages all losses that fall into one
    bucket before it moves that bucket, so that none is lost when several samples share it.
    """

    def __init__(self, buckets: Count = 300, momentum: Share = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("edges", torch.linspace(-10, 10, buckets - 1))
        self.register_buffer("losses", torch.ones(buckets))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Weights (batch,) for float32 timesteps (batch,) in [0, 1]."""
        return 1 / self.losses[torch.bucketize(log_snr(timesteps), self.edges)].clamp(1e-7, 1e7)

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Moves the buckets towards the unweighted ``losses`` (batch,) measured at ``timesteps`` (batch,)."""
        index = torch.bucketize(log_snr(timesteps), self.edges)
        count = torch.zeros_like(self.losses).index_add_(0, index, torch.ones_like(losses))
        total = torch.zeros_like(self.losses).index_add_(0, index, losses)
        mean = total / count.clamp(min=1)
        self.losses.copy_(torch.where(count > 0, self.losses * self.momentum + mean * (1 - self.momentum), self.losses))


WEIGHTS = {"p2": P2Weight, "adaptive": AdaptiveLossWeight}


def loss_weight(kind: str, **arguments: Any) -> P2Weight | AdaptiveLossWeight:
    """The weight that a configuration's table ``weight`` asks for, e.g. ``{ kind = "p2", k = 1.0 }``.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weight.kind is {kind!r}; it must be one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[kind](**arguments)


def diffusion_losses(epsilon: Tensor, noise: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What a step of a diffusion stage logs and minimises, float32.

    Args:
        epsilon: the prediction (batch, C, H, W).
        noise: what was to be predicted, of the same shape.
        weights: (batch,).

    Returns:
        ``loss``, the weighted mean of the squared errors; ``errors`` (batch,), those of each sample; ``epsilon``, their mean.
    """
    errors = (epsilon.float() - noise).square().mean(dim=(1, 2, 3))
    return {"loss": (errors * weights).mean(), "errors": errors.detach(), "epsilon": errors.mean().detach()}


def pyramid_noise(shape: tuple[int, ...], generator: torch.Generator, decay: float = 0.75, largest: int = 16) -> Tensor:
    """Noise (B, C, H, W) of unit variance in which coarse levels carry more weight than in white noise.

    Level i is white noise at 1/2**i of the size, brought up bilinearly and weighted ``decay**i``, up to 1/``largest``; Stage B of
    the published model was trained with it. ``decay`` 0 gives white noise, which is what sampling starts from.

    Bilinear enlarging by f leaves a deviation of ``2/3 - 1 / (6 f**2)`` (the mean over its phases); it is divided out here. The
    authors do not, so that their training noise is weaker than their sampling noise.
    """
    height, width = shape[-2:]
    noise = torch.randn(shape, generator=generator, device=generator.device)
    power, factor, weight = 1.0, 2, decay
    while weight and factor <= min(largest, height, width):
        size = (height // factor, width // factor)
        coarse = torch.randn((*shape[:-2], *size), generator=generator, device=generator.device)
        enlarged = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        noise = noise + weight * enlarged / (2 / 3 - 1 / (6 * factor**2))
        power += weight**2
        factor, weight = 2 * factor, weight * decay
    return noise / power**0.5


def keep_mask(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    """Boolean mask (batch,): true with ``probability``. For condition dropout."""
    return torch.rand(batch, generator=generator, device=generator.device) < probability
