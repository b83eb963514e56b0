"""What `speed`, `sampler` and `guidance_interval` do to a request, from the plan to the networks' forwards."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade import Cascade, Lora, Progress, Request
from cascade.limits import LIMITS, MODELS_OWN, InputError
from cascade.plan import Planner, Sampling
from cascade.sampling import SAMPLERS
from cascade.speeds import SPEEDS
from cascade.weights import PUBLISHED_SAMPLER
from tests.tiny import count_calls, make_cascade

SMALL = {"width": 72, "height": 64}
PLANNER = Planner(PUBLISHED_SAMPLER, 1024, 2048, True, True, True, {})


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def read(cascade: Cascade, **request: Any) -> np.ndarray:
    (image,) = cascade.generate(Request("a cat", seed=3, **SMALL, **request))
    return np.asarray(image).astype(int)


def test_limits_name_all_samplers_and_speeds() -> None:
    assert LIMITS["sampler"].choices == (MODELS_OWN, *SAMPLERS)
    assert LIMITS["speed"].choices == tuple(SPEEDS)


def test_exact_is_what_the_model_folder_says() -> None:
    assert PLANNER.sampling(Request("")) == Sampling(**PUBLISHED_SAMPLER)


@pytest.mark.parametrize("speed", ["fast", "turbo"])
def test_a_speed_fills_in_what_is_left_open(speed: str) -> None:
    sampling, wanted = PLANNER.sampling(Request("", speed=speed)), SPEEDS[speed]
    assert sampling.prior == replace(PUBLISHED_SAMPLER["prior"], **wanted.prior)
    assert sampling.decoder == replace(PUBLISHED_SAMPLER["decoder"], **wanted.decoder)
    assert sampling.interval == wanted.interval
    assert sampling.prior.steps < PUBLISHED_SAMPLER["prior"].steps


def test_what_is_given_overrides_the_speed() -> None:
    given = {"steps_prior": 30, "steps_decoder": 12, "guidance_scale_prior": 6, "guidance_scale_decoder": 2}
    request = Request("", speed="fast", sampler="ddpm", guidance_interval=(0.25, 0.5), **given)
    prior, decoder, interval = PLANNER.sampling(request)
    assert (prior.steps, decoder.steps, prior.guidance, decoder.guidance) == (30, 12, 6, 2)
    assert (prior.sampler, decoder.sampler, interval) == ("ddpm", "ddpm", (0.25, 0.5))


def test_a_speed_never_adds_steps() -> None:
    few: Mapping[str, Any] = {stage: replace(one, steps=2) for stage, one in PUBLISHED_SAMPLER.items()}
    sampling = replace(PLANNER, defaults=few).sampling(Request("", speed="fast"))
    assert (sampling.prior.steps, sampling.decoder.steps) == (2, 2)


def test_the_model_folder_has_a_sampler() -> None:
    own = {stage: replace(one, sampler="ddim") for stage, one in PUBLISHED_SAMPLER.items()}
    prior, decoder, _ = replace(PLANNER, defaults=own).sampling(Request(""))
    assert (prior.sampler, decoder.sampler) == ("ddim", "ddim")


def test_what_the_log_says() -> None:
    request = Request(
        "", sampler="ddim", guidance_interval=(0, 0.6), steps_prior=8, steps_decoder=1, guidance_scale_decoder=1
    )
    assert str(PLANNER.sampling(request)) == (
        "Stage C 8 steps of ddim with guidance 4 from 0 to 0.6 of the steps; Stage B 1 step of ddim without guidance"
    )


def test_turbo_needs_distilled_weights(cascade: Cascade) -> None:
    sentence = r"^speed is 'turbo', which needs distilled weights in the model folder \(.*\); this model has none\.$"
    with pytest.raises(InputError, match=sentence):
        cascade.generate(Request("a cat", speed="turbo"))
    with pytest.raises(InputError, match=sentence):
        PLANNER.resolved(Request("a cat", speed="turbo"))


def test_turbo_adds_the_distilled_weights(tmp_path: Path) -> None:
    distilled = replace(PLANNER, distilled=tmp_path / "lora.safetensors")
    request = Request("", speed="turbo", loras=[Lora("ink", 0.5)])
    assert distilled.plan((request,)).loras == (Lora("ink", 0.5), Lora(tmp_path / "lora.safetensors"))
    assert distilled.plan((replace(request, speed="fast"),)).loras == (Lora("ink", 0.5),)


def test_only_the_interval_is_guided(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(cascade.prior, monkeypatch)
    read(cascade, steps_prior=4, guidance_interval=(0.25, 0.75))
    assert calls == [1, 2, 2, 1]


def test_the_whole_interval_is_plain_guidance_and_an_early_end_is_not(cascade: Cascade) -> None:
    plain = read(cascade, steps_prior=4)
    assert (read(cascade, steps_prior=4, guidance_interval=(0, 1)) == plain).all()
    assert (read(cascade, steps_prior=4, guidance_interval=(0, 0.5)) != plain).any()


def test_steps_outside_of_the_interval_are_those_without_guidance(cascade: Cascade) -> None:
    """Before the interval, with a negative prompt of another length; the network's rounding may depend on the batch."""

    def first(**given: Any) -> Progress:
        request = Request("a cat", "two dogs and rain", seed=3, steps_prior=4, **SMALL, **given)
        return next(one for one in cascade.steps(request) if one.stage == "prior")

    late = first(guidance_interval=(0.5, 1)).latents
    without = first(guidance_scale_prior=1, guidance_scale_decoder=1).latents
    guided = first().latents
    scale = without.std()
    assert (late - without).abs().max() < 1e-4 * scale
    assert (guided - without).abs().max() > 1e-2 * scale


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ((0.5, 0.5), "guidance_interval[0] is 0.5; it must be less than guidance_interval[1], which is 0.5."),
        ((0.5,), "guidance_interval has 1 value; it must have 2."),
        ((0, 1.5), "guidance_interval[1] is 1.5; it must be a number from 0 to 1."),
    ],
)
def test_wrong_intervals(interval: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        Request("", guidance_interval=interval)
    assert str(caught.value) == sentence
