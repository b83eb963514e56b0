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
from cascade.sampling import Sampling
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
        Sampling(
            data["x_init"],
            steps=case["steps"],
            shift=case["shift"],
            sampler=case["sampler"],
            t_start=case["t_start"],
            noise=lambda index: data["noise"][index],
        ).steps(model)
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
    options = {"steps": 12, "shift": shift, "noise": lambda _: noise(3, 8, 8)}
    if sampler == "diffusers":
        taken = diffusers.DiffusersSampling(noise(3, 8, 8), **options)
    else:
        taken = Sampling(noise(3, 8, 8), sampler=sampler, **options)
    *_, last = taken.steps(model)
    torch.testing.assert_close(last.x0, point, atol=1e-2, rtol=0)
    assert (last.x - point).std() < 0.05


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The optimal epsilon for Gaussian data of variance 0.25: linear in x."""
    alpha, sigma = (factor.view(-1, 1) for factor in sampling.alpha_sigma(sampling.log_snr(t)))
    return sigma * x / (alpha.square() * 0.25 + sigma.square())


def test_gaussian_data_keeps_its_variance() -> None:
    """DDPM's samples must have the data's variance."""
    noise = sampling.Noise([0])
    *_, last = Sampling(noise(20_000), steps=200, noise=lambda _: noise(20_000)).steps(gaussian)
    assert last.x.var().item() == pytest.approx(0.25, rel=0.05)


def test_cosine_spacing_is_ddim_at_other_times() -> None:
    x, times = sampling.Noise([0])(100), sampling.cosine_times(5, 1.0)
    run = list(Sampling(x, steps=5, shift=2.0, sampler="ddim_cosine", noise=None).steps(gaussian))
    log_snrs = sampling.log_snr(times, 2.0)
    assert [step.t for step in run] == sampling.timestep(log_snrs)[:-1].tolist()
    for now, after, step in zip(log_snrs[:-1], log_snrs[1:], run, strict=True):
        eps = gaussian(x, sampling.timestep(now).expand(1))
        alpha, sigma = sampling.alpha_sigma(now)
        x = sampling.ddim_step(x, (x - sigma * eps) / alpha, eps, now, after, x)
        torch.testing.assert_close(step.x, x)
    assert times.diff().abs().argmax() == 2  # the steps in the middle are the longest


@given(steps=st.integers(1, 60), start=st.floats(0.05, 1))
def test_times_lead_from_the_start_to_the_data(steps: int, start: float) -> None:
    for times in (sampling.even_times(steps, start), sampling.cosine_times(steps, start)):
        assert len(times) == steps + 1
        assert times[0].item() == pytest.approx(start)
        assert times[-1].item() == pytest.approx(0, abs=1e-7)
        assert (times.diff() < 0).all()


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
    steps = list(Sampling(start, steps=2, noise=lambda _: torch.ones_like(start)).steps(model))
    assert set(seen) == {(torch.float32, torch.float32, (2,))}
    assert {step.x.dtype for step in steps} | {step.x0.dtype for step in steps} == {torch.float32}


def test_noise_is_drawn_step_by_step_and_never_for_ddim() -> None:
    drawn = []

    def noise(index: int) -> Tensor:
        drawn.append(index)
        return torch.zeros(1, 2)

    run = Sampling(torch.zeros(1, 2), steps=3, noise=noise).steps(lambda x, t: x)
    next(run)
    assert drawn == [0]
    next(run)
    assert drawn == [0, 1]
    list(Sampling(torch.zeros(1, 2), steps=3, sampler="ddim", noise=noise).steps(lambda x, t: x))
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
        ({"sampler": "euler"}, "sampler is 'euler'; it must be one of ddpm, ddim, ddim_cosine, lcm"),
    ],
)
def test_wrong_arguments_are_refused_at_once(wrong: dict[str, Any], message: str) -> None:
    arguments = {"steps": 2, "noise": torch.zeros_like, **wrong}
    with pytest.raises(ValueError, match=message):
        Sampling(torch.zeros(1, 2), **arguments)
