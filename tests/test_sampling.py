"""The schedule and the samplers, against the authors' trajectories and against theory."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cascade import sampling
from cascade.compat import diffusers
from tests import fixture_data

DESCRIPTION = fixture_data.description("sampler")
DATA = fixture_data.tensors("sampler")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def closed_form(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """The model of the reference runs, see sampler.json."""
    return 0.5 * torch.tanh(x) + 0.2 * t.view(-1, 1, 1, 1) + 0.1 * cond


@pytest.mark.parametrize("case", DESCRIPTION["cases"], ids=lambda case: f"{case['index']}-{case['sampler']}")
def test_reference_trajectories(case: dict[str, Any]) -> None:
    data = {key.partition("_")[2]: value for key, value in DATA.items() if key.startswith(f"{case['index']}_")}

    def model(x: Tensor, t: Tensor) -> Tensor:
        cond = closed_form(x, t, data["cond"])
        if case["guidance"] is None:
            return cond
        uncond = closed_form(x, t, torch.zeros_like(data["cond"]))
        # The authors rescale by the deviation of the whole batch: here, the batch is one sample.
        return sampling.guide(cond[None], uncond[None], case["guidance"], case["guidance_rescale"])[0]

    steps = list(
        sampling.sample(
            model,
            data["x_init"],
            steps=case["steps"],
            shift=case["shift"],
            sampler=case["sampler"],
            t_start=case["t_start"],
            noise=lambda index: data["noise"][index],
        )
    )

    assert [(step.index, step.total) for step in steps] == [(i, case["steps"]) for i in range(case["steps"])]
    times = torch.linspace(case["t_start"], 0, case["steps"] + 1)
    assert relative_error(sampling.log_snr(times, case["shift"]), data["logsnr"]) <= 1e-5
    told = torch.tensor([step.t for step in steps])
    assert relative_error(told, data["noise_cond"]) <= 1e-5
    for step, expected in zip(steps, data["out_trajectory"], strict=True):
        assert relative_error(step.x, expected) <= 1e-5


def test_reference_noising() -> None:
    x0, noise, x = DATA["5_diffuse_x0"], DATA["5_diffuse_eps"], DATA["5_x_init"]
    times = torch.full((len(x0),), 0.8)
    assert relative_error(sampling.log_snr(times), DATA["5_diffuse_logsnr"]) <= 1e-5
    assert relative_error(sampling.diffuse(x0, noise, times), x) <= 1e-5
    assert relative_error(sampling.diffuse(x0, noise, torch.tensor(0.8)), x) <= 1e-5


@given(t=st.floats(0.01, 0.99))
def test_timestep_inverts_the_schedule(t: float) -> None:
    assert sampling.timestep(sampling.log_snr(torch.tensor(t))).item() == pytest.approx(t, abs=2e-4)


@given(t=st.floats(0, 1), shift=st.floats(0.25, 8))
def test_alpha_and_sigma_belong_to_the_log_snr(t: float, shift: float) -> None:
    log_snr = sampling.log_snr(torch.tensor(t), shift)
    alpha, sigma = sampling.alpha_sigma(log_snr)
    assert (alpha.square() + sigma.square()).item() == pytest.approx(1, abs=1e-6)
    assert 2 * math.log(alpha / sigma) == pytest.approx(log_snr.item(), abs=1e-4)


def test_shift_makes_noisier_within_the_same_limits() -> None:
    times = torch.linspace(0, 1, 21)
    plain, shifted = sampling.log_snr(times), sampling.log_snr(times, 2.0)
    torch.testing.assert_close((plain - shifted)[:-2], torch.full((19,), 2 * math.log(2)))
    assert shifted.min().item() == pytest.approx(plain.min().item(), abs=1e-5)


@pytest.mark.parametrize("sampler", [*sampling.SAMPLERS, "diffusers"])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_every_sampler_finds_the_only_picture_there_is(sampler: str, shift: float) -> None:
    """If the data is a single point, the optimal epsilon is known, and every sampler must end at that point."""
    generator = torch.Generator().manual_seed(0)
    point = torch.randn(2, 3, 8, 8, generator=generator)

    def model(x: Tensor, t: Tensor) -> Tensor:
        log_snr = sampling.log_snr(t)
        if sampler == "diffusers":
            log_snr = sampling.log_snr(t, shift)  # gets the unshifted time, so the model must know the shift
        alpha, sigma = (factor.view(-1, 1, 1, 1) for factor in sampling.alpha_sigma(log_snr))
        return (x - alpha * point) / sigma

    noise = sampling.Noise([1, 2])
    sample = diffusers.sample if sampler == "diffusers" else sampling.sample
    *_, last = sample(model, noise(3, 8, 8), steps=12, shift=shift, sampler=sampler, noise=lambda _: noise(3, 8, 8))
    torch.testing.assert_close(last.x0, point, atol=1e-2, rtol=0)
    assert (last.x - point).std() < 0.05


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The optimal epsilon for Gaussian data of variance 0.25."""
    alpha, sigma = (factor.view(-1, 1) for factor in sampling.alpha_sigma(sampling.log_snr(t)))
    return sigma * x / (alpha.square() * 0.25 + sigma.square())


def variance(sampler: str, steps: int) -> float:
    """Of samples of the data of `gaussian`."""
    noise = sampling.Noise([0])
    drawn = sampling.sample(gaussian, noise(20_000), steps=steps, sampler=sampler, noise=lambda _: noise(20_000))
    return sampling.finish(drawn).var().item()


def test_gaussian_data_keeps_its_variance() -> None:
    """For Gaussian data of variance v, the optimal epsilon is linear in x, and DDPM's samples must have variance v."""
    assert variance("ddpm", 200) == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("steps", [10, 20, 200])
def test_second_order_with_noise_keeps_the_variance_better(steps: int) -> None:
    assert abs(variance("dpmpp_2m_sde", steps) - 0.25) < abs(variance("ddpm", steps) - 0.25)


def test_second_order_comes_nearer_to_the_exact_solution() -> None:
    """Of the same ordinary differential equation, at the same number of steps: its solution multiplies x by the ratio of the
    deviations, sqrt(0.25 alpha**2 + sigma**2), at the end and at the start."""
    x = sampling.Noise([0])(4000)
    alpha, sigma = sampling.alpha_sigma(sampling.log_snr(torch.tensor([1.0, 0.0])))
    deviations = (0.25 * alpha.square() + sigma.square()).sqrt()
    exact = x * deviations[1] / deviations[0]
    for steps in (8, 10, 20):
        errors = {
            name: relative_error(
                sampling.finish(sampling.sample(gaussian, x, steps=steps, sampler=name, noise=None)), exact
            )
            for name in ("ddim", "dpmpp_2m")
        }
        assert errors["dpmpp_2m"] < 0.5 * errors["ddim"]


def test_second_order_is_dpm_solver() -> None:
    """Algorithm 2 of Lu et al. (arXiv 2211.01095), written out, with half of the logSNR as lambda."""
    x, steps = sampling.Noise([0])(100), 6
    *_, last = sampling.sample(gaussian, x, steps=steps, sampler="dpmpp_2m", noise=None)
    log_snrs = sampling.log_snr(torch.linspace(1, 0, steps + 1))
    told, lambdas = sampling.timestep(log_snrs), log_snrs / 2
    alphas, sigmas = sampling.alpha_sigma(log_snrs)
    estimates: list[Tensor] = []
    for i in range(steps):
        estimates.append((x - sigmas[i] * gaussian(x, told[i].expand(1))) / alphas[i])
        used, h = estimates[i], lambdas[i + 1] - lambdas[i]
        if 0 < i < steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            used = (1 + 1 / (2 * r)) * estimates[i] - 1 / (2 * r) * estimates[i - 1]
        x = sigmas[i + 1] / sigmas[i] * x - alphas[i + 1] * torch.expm1(-h) * used
    torch.testing.assert_close(last.x, x, atol=1e-5, rtol=1e-4)


def test_diffusers_step_is_the_ddpm_step() -> None:
    generator = torch.Generator().manual_seed(0)
    x, eps, noise = (torch.randn(2, 3, 4, generator=generator) for _ in range(3))
    now, after = sampling.log_snr(torch.tensor([0.6, 0.5]))
    alpha, sigma = sampling.alpha_sigma(now)
    ours = sampling.ddpm_step(x, (x - sigma * eps) / alpha, eps, now, after, noise)
    torch.testing.assert_close(diffusers.posterior_step(x, eps, now, after, noise), ours)


def test_guidance_scale() -> None:
    cond, uncond = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampling.guide(cond, uncond, 1.0, 0.0), cond)
    torch.testing.assert_close(sampling.guide(cond, uncond, 4.0, 0.0), uncond + 4 * (cond - uncond))


def test_full_rescale_restores_the_deviation_of_every_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(3, 4, 8, 8, generator=generator) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    uncond = torch.randn(3, 4, 8, 8, generator=generator)
    guided = sampling.guide(cond, uncond, 4.0, 1.0)
    torch.testing.assert_close(guided.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))


def test_guidance_of_a_sample_does_not_depend_on_its_batch() -> None:
    cond, uncond = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = sampling.guide(cond, uncond, 4.0, 0.7)
    torch.testing.assert_close(together[1:2], sampling.guide(cond[1:2], uncond[1:2], 4.0, 0.7))


def test_latents_and_timesteps_stay_float32() -> None:
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype, t.shape))
        return x.bfloat16()

    start = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    steps = list(sampling.sample(model, start, steps=2, noise=lambda _: torch.ones_like(start)))
    assert set(seen) == {(torch.float32, torch.float32, (2,))}
    assert {step.x.dtype for step in steps} | {step.x0.dtype for step in steps} == {torch.float32}


def test_noise_is_drawn_step_by_step_and_never_for_ddim() -> None:
    drawn = []

    def noise(index: int) -> Tensor:
        drawn.append(index)
        return torch.zeros(1, 2)

    run = sampling.sample(lambda x, t: x, torch.zeros(1, 2), steps=3, noise=noise)
    next(run)
    assert drawn == [0]
    next(run)
    assert drawn == [0, 1]
    list(sampling.sample(lambda x, t: x, torch.zeros(1, 2), steps=3, sampler="ddim", noise=noise))
    assert drawn == [0, 1]


@given(seed=st.integers(0, 2**32), batch=st.integers(1, 4))
def test_noise_of_an_image_depends_on_its_own_seed_only(seed: int, batch: int) -> None:
    together = sampling.Noise(range(seed, seed + batch))
    alone = sampling.Noise([seed + batch - 1])
    for shape in ((2, 3, 3), (1, 5, 7)):
        assert torch.equal(together(*shape)[-1:], alone(*shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"t_start": 0.0}, "t_start is 0.0; it must be above 0"),
        ({"t_start": 1.5}, "t_start is 1.5"),
        ({"shift": 0.0}, "shift is 0.0; it must be above 0"),
        ({"sampler": "euler"}, "sampler is 'euler'; it must be one of ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, lcm"),
    ],
)
def test_wrong_arguments_are_refused_at_once(wrong: dict[str, Any], message: str) -> None:
    arguments = {"steps": 2, "noise": torch.zeros_like, **wrong}
    with pytest.raises(ValueError, match=message):
        sampling.sample(lambda x, t: x, torch.zeros(1, 2), **arguments)
