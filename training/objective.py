"""The training objective of the diffusion stages: noise, timesteps, and the weight of each error.

Pure float32 tensor maths. Every random draw takes a generator, so a step can be repeated exactly.
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

    Source: Choi et al., Perception Prioritized Training of Diffusion Models, arXiv 2204.00227 (gamma = 1). The authors of Stable
    Cascade use k = 1. A smaller k gives more weight to errors near t = 1, which matter when sampling takes few steps: the first
    step magnifies Stage B's error there some fifteen times. After 8,000 steps with k = 1, the miniature's Stage B predicted
    latents at t = 1 that were worse than gray (error 1.5 standard deviations of the latents; 0.34 at t = 0.9). The floor keeps
    some weight on the last, nearly noiseless steps.
    """

    def __init__(self, k: Amount = 1.0, floor: Amount = 0.0) -> None:
        super().__init__()
        self.k, self.floor = k, floor

    def forward(self, timesteps: Tensor) -> Tensor:
        """Weights (batch,) for float32 timesteps (batch,) in [0, 1]."""
        return 1 / (self.k + log_snr(timesteps).exp()) + self.floor

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Does nothing: this weight does not depend on the loss."""


class AdaptiveLossWeight(nn.Module):
    """The authors' adaptive weight: one over the running mean of the loss in the same bucket of logSNR.

    ``buckets - 1`` edges are spread evenly over logSNR from -10 to 10. `update` first averages all losses of a bucket, so that
    every sample counts when several fall into one.
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
        """Moves the buckets towards the unweighted ``losses`` (batch,) at ``timesteps`` (batch,)."""
        index = torch.bucketize(log_snr(timesteps), self.edges)
        count = torch.zeros_like(self.losses).index_add_(0, index, torch.ones_like(losses))
        total = torch.zeros_like(self.losses).index_add_(0, index, losses)
        mean = total / count.clamp(min=1)
        self.losses.copy_(torch.where(count > 0, self.losses * self.momentum + mean * (1 - self.momentum), self.losses))


LossWeight = P2Weight | AdaptiveLossWeight
WEIGHTS: dict[str, type[LossWeight]] = {"p2": P2Weight, "adaptive": AdaptiveLossWeight}


def loss_weight(kind: str, **arguments: Any) -> LossWeight:
    """The weight of a configuration's table ``weight``, such as ``{ kind = "p2", k = 1.0 }``.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"weight.kind is {kind!r}; it must be one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[kind](**arguments)


def diffusion_losses(epsilon: Tensor, noise: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The losses of a diffusion stage, float32.

    Args:
        epsilon: the prediction (batch, C, H, W).
        noise: the noise that was to be predicted, of the same shape.
        weights: (batch,).

    Returns:
        ``loss``, the weighted mean of the squared errors; ``errors`` (batch,), the error of each sample; ``epsilon``, their mean.
    """
    errors = (epsilon.float() - noise).square().mean(dim=(1, 2, 3))
    return {"loss": (errors * weights).mean(), "errors": errors.detach(), "epsilon": errors.mean().detach()}


def pyramid_noise(shape: tuple[int, ...], generator: torch.Generator, decay: float = 0.75, largest: int = 16) -> Tensor:
    """Noise (B, C, H, W) of unit variance with more weight on coarse structure than white noise.

    It is a sum of levels. Level i is white noise at 1/2**i of the size, enlarged bilinearly and weighted by ``decay**i``, down to
    1/``largest`` of the size. The authors trained Stage B with ``decay`` 0.75; 0 gives white noise, which sampling starts from.

    Enlarging bilinearly by f reduces the standard deviation to ``2/3 - 1 / (6 f**2)``, the mean over all phases. It is divided
    out here. The authors do not do that, so their training noise is weaker than their sampling noise.
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
    """Boolean mask (batch,), each true with ``probability``; for dropping conditions."""
    return torch.rand(batch, generator=generator, device=generator.device) < probability
