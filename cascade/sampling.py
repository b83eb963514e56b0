"""Diffusion sampling: schedule, guidance and steps. Pure tensor maths in float32; knows no network and no stage.

Formulas are from the authors' code (Stability-AI/StableCascade, `gdf/`) unless another source is named. Time `t` runs from 1
(noise) to 0 (data). The model predicts epsilon. Noisy data is `alpha * x0 + sigma * epsilon`, where
`alpha**2 + sigma**2 = 1` and `alpha**2 = sigmoid(logSNR)`.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

OFFSET = 0.008  # the cosine schedule's s (Nichol and Dhariwal, arXiv 2102.09672)
VARIANCE_LIMITS = (0.0001, 0.9999)
START_VARIANCE = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2


def log_snr(t: Tensor, shift: float = 1.0) -> Tensor:
    """The cosine schedule: float32 logSNR, in the shape of `t`, about -9.21 to 9.21.

    Args:
        t: times in [0, 1].
        shift: > 0. Above 1, the schedule is noisier, for larger latents (Hoogeboom et al., arXiv 2301.11093). It does not
            move the limits to which logSNR is clamped.
    """
    variance = torch.cos((t.float() + OFFSET) / (1 + OFFSET) * (math.pi / 2)).square() / START_VARIANCE
    variance = variance.clamp(*VARIANCE_LIMITS)
    low, high = (math.log(limit / (1 - limit)) for limit in VARIANCE_LIMITS)
    return (torch.log(variance / (1 - variance)) - 2 * math.log(shift)).clamp(low, high)


def timestep(log_snr: Tensor) -> Tensor:
    """The model's timestep for a logSNR: the time in [0, 1] at which the unshifted schedule has it. float32, same shape."""
    cosine = (torch.sigmoid(log_snr.float()) * START_VARIANCE).sqrt()
    return (torch.acos(cosine) / (math.pi / 2) * (1 + OFFSET) - OFFSET).clamp(0, 1)


def alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of data and noise at a logSNR: two float32 tensors in its shape, in (0, 1)."""
    # sigmoid(-x) instead of 1 - sigmoid(x), which loses digits where there is little noise.
    return torch.sigmoid(log_snr.float()).sqrt(), torch.sigmoid(-log_snr.float()).sqrt()


def diffuse(x0: Tensor, noise: Tensor, t: Tensor, shift: float = 1.0) -> Tensor:
    """Add noise to data (B, ...), up to the times `t` in [0, 1], (B,) or a single value. Returns float32 (B, ...)."""
    alpha, sigma = (factor.view(-1, *[1] * (x0.ndim - 1)) for factor in alpha_sigma(log_snr(t, shift)))
    return alpha.to(x0.device) * x0.float() + sigma.to(x0.device) * noise.float()


def guide(cond: Tensor, uncond: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, with the rescaling of Lin et al. (arXiv 2305.08891, section 3.4). float32 (B, ...).

    Args:
        cond, uncond: predictions with and without the conditions, (B, ...).
        scale: guidance scale. 1 returns `cond`; higher values move away from `uncond`.
        rescale: 0 to 1, how far the result's standard deviation is brought back to that of `cond`. It is computed per sample.
            The authors compute it over the batch, so that an image depends on the others in its batch.
    """
    cond, uncond = cond.float(), uncond.float()
    guided = torch.lerp(uncond, cond, scale)
    if rescale == 0:
        return guided
    axes = tuple(range(1, cond.ndim))
    wanted, actual = (value.std(dim=axes, keepdim=True) for value in (cond, guided))
    return guided * (rescale * wanted / (actual + 1e-9) + (1 - rescale))


def with_guidance(
    model: Callable[[Tensor, Tensor], Tensor], scale: float, rescale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Add guidance to a model that predicts the conditional and the unconditional half in one batch.

    Args:
        model: x (2B, ...), t (2B,) -> epsilon (2B, ...), the first half with the conditions, the second half without.
        scale, rescale: see `guide`.

    Returns:
        A model for `Sampling.steps`: x (B, ...), t (B,) -> epsilon (B, ...).
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        return guide(cond, uncond, scale, rescale)

    return guided


def beside_zeros(condition: Tensor, halves: int) -> Tensor:
    """A condition (B, ...) for guidance: followed by zeros for the unconditional half if `halves` is 2. (halves * B, ...)."""
    return torch.cat([condition, torch.zeros_like(condition)][:halves])


def ddpm_step(x: Tensor, x0: Tensor, eps: Tensor, log_snr: Tensor, next_log_snr: Tensor, noise: Tensor) -> Tensor:
    """One ancestral step (Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502 with eta 1). All tensors are float32.

    Args:
        x, x0, eps: the noisy latents, and the model's estimates of data and noise in them, (B, ...).
        log_snr, next_log_snr: before and after the step; single values.
        noise: white noise in the shape of `x`.
    """
    alpha, sigma = alpha_sigma(log_snr)
    next_alpha, next_sigma = alpha_sigma(next_log_snr)
    added = next_sigma / sigma * (1 - (alpha / next_alpha).square()).clamp(min=0).sqrt()
    kept = (next_sigma.square() - added.square()).clamp(min=0).sqrt()
    return next_alpha * x0 + kept * eps + added * noise


def ddim_step(x: Tensor, x0: Tensor, eps: Tensor, log_snr: Tensor, next_log_snr: Tensor, noise: Tensor) -> Tensor:
    """One deterministic step (Song et al., arXiv 2010.02502, eta 0). Arguments as in `ddpm_step`; `noise` is ignored."""
    next_alpha, next_sigma = alpha_sigma(next_log_snr)
    return next_alpha * x0 + next_sigma * eps


def lcm_step(x: Tensor, x0: Tensor, eps: Tensor, log_snr: Tensor, next_log_snr: Tensor, noise: Tensor) -> Tensor:
    """One step of a consistency model (Luo et al., arXiv 2310.04378): adds new noise to x0. Arguments as in `ddpm_step`."""
    next_alpha, next_sigma = alpha_sigma(next_log_snr)
    return next_alpha * x0 + next_sigma * noise


def even_times(steps: int, start: float) -> Tensor:
    """Times of `steps` steps of equal length: float32 (steps + 1,), from `start` to 0."""
    return torch.linspace(start, 0, steps + 1)


def cosine_times(steps: int, start: float) -> Tensor:
    """The same, spaced as a cosine is: steps at both ends are short, where logSNR changes fastest. docs/experiments.md."""
    return start * (1 + torch.cos(math.pi * torch.linspace(0, 1, steps + 1))) / 2


class Sampler(NamedTuple):
    """How steps are taken.

    Attributes:
        step: takes one, see `ddpm_step`.
        times: number of steps, time of the first -> the times, see `even_times`.
        noise: whether `step` uses noise.
    """

    step: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    times: Callable[[int, float], Tensor] = even_times
    noise: bool = True


SAMPLERS = {
    "ddpm": Sampler(ddpm_step),
    "ddim": Sampler(ddim_step, noise=False),
    "ddim_cosine": Sampler(ddim_step, cosine_times, noise=False),
    "lcm": Sampler(lcm_step),
}


class Step(NamedTuple):
    """A finished step of a sampler.

    Attributes:
        index: 0 to total - 1.
        total: number of steps.
        x: the latents after the step, float32 (B, ...). After the last step, the result.
        x0: the model's estimate of the finished latents, float32 (B, ...). Previews show it.
        t: the timestep that was passed to the model.
    """

    index: int
    total: int
    x: Tensor
    x0: Tensor
    t: float


class Sampling:
    """A sampler at work: `x` and `t` are what the model is given, and `take` makes the next step of its prediction.

    A subclass may take steps in another way: see `compat`.

    Args:
        x: the initial latents, (B, ...): white noise, or data noised by `diffuse` to `t_start` at the same shift.
        steps: number of steps, at least 1, from `t_start` to 0.
        shift: shift of the schedule, see `log_snr`.
        sampler: a key of `SAMPLERS`.
        t_start: in (0, 1].
        noise: index of a step -> white noise in the shape of `x`. Called once per step, in order, for samplers that use it.
        hold: (latents after a step, their logSNR) -> the latents to continue with. Inpainting restores known latents here.

    Attributes:
        x: the latents before the next step, float32 (B, ...).
        index: the number of steps taken.
        total: the number of all steps.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        steps: int,
        shift: float = 1.0,
        sampler: str = "ddpm",
        t_start: float = 1.0,
        noise: Callable[[int], Tensor],
        hold: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}; it must be at least 1.")
        if not 0 < t_start <= 1:
            raise ValueError(f"t_start is {t_start}; it must be above 0 and at most 1.")
        if not shift > 0:
            raise ValueError(f"shift is {shift}; it must be above 0.")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(SAMPLERS)}.")
        self.x, self.index, self.total = x.float(), 0, steps
        self.sampler, self.noise, self.hold = SAMPLERS[sampler], noise, hold
        # The schedule is computed on the CPU, so that it is equal on all devices. Only the model's timesteps are moved.
        times = self.sampler.times(steps, t_start)
        self.log_snrs = log_snr(times, shift)
        self.told = self.timesteps(times)
        self.told_on_device = self.told.to(x.device)

    @property
    def t(self) -> Tensor:
        """The model's timestep for the next step, float32 (B,)."""
        return self.told_on_device[self.index].expand(self.x.shape[0])

    def take(self, eps: Tensor) -> Step:
        """Take the next step. eps: the model's prediction for `x` and `t`, (B, ...)."""
        eps, index = eps.float(), self.index
        alpha, sigma = alpha_sigma(self.log_snrs[index])
        x0 = (self.x - sigma * eps) / alpha
        self.x = self.moved(x0, eps)
        if self.hold is not None:
            self.x = self.hold(self.x, self.log_snrs[index + 1])
        self.index += 1
        return Step(index, self.total, self.x, x0, self.told[index].item())

    def steps(self, model: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Step]:
        """Take all steps. The caller may stop at any of them.

        model: (x, t) -> epsilon, with x float32 (B, ...) and t float32 (B,). For guidance, see `with_guidance`.
        """
        while self.index < self.total:
            yield self.take(model(self.x, self.t))

    def timesteps(self, times: Tensor) -> Tensor:
        """The model's timesteps at times, float32 in their shape."""
        return timestep(self.log_snrs)

    def moved(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The latents after the next step, by the model's estimates of data and noise in `x`."""
        fresh = self.noise(self.index).to(self.x) if self.sampler.noise else torch.zeros_like(self.x)
        return self.sampler.step(self.x, x0, eps, *self.log_snrs[self.index : self.index + 2], fresh)


def finish(steps: Iterable[Any]) -> Tensor:
    """Take all remaining steps, and return the latents after the last one. steps: ends in a `Step`."""
    (last,) = deque(steps, maxlen=1)
    return last.x


class Noise:
    """White noise for a batch of images, from one CPU generator per image.

    An image's noise depends only on its seed and on the earlier draws for it, not on the batch or the device.

    Args:
        seeds: one per image.
        device: the device of the returned noise.
    """

    def __init__(self, seeds: Sequence[int], device: str | torch.device = "cpu") -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.generators)

    def __call__(self, *shape: int) -> Tensor:
        """Draw the next noise, float32 (B, *shape)."""
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self.generators])
        # A copy from pinned memory is queued on the GPU, so this thread does not wait for it.
        return drawn.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else drawn
