"""Stage C: guidance's halves, the number of calls, and what an image depends on."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings, joined
from cascade.sampling import Noise, diffuse, finish
from cascade.stages.prior import Residuals, prior_steps, residuals_by_step, steps_taken
from cascade.stages.text import TextEncoder
from tests.tiny import count_calls

SIZE = (3, 5)


@pytest.fixture(scope="module")
def prior(components: dict[str, Any]) -> StableCascadeUNet:
    return copy.deepcopy(components["prior"])


@pytest.fixture(scope="module")
def texts(components: dict[str, Any]) -> tuple[TextEmbeddings, TextEmbeddings]:
    encoder = TextEncoder(components["tokenizer"], components["text_encoder"])
    return encoder.encode(["a cat"]), encoder.encode([""])


def make(prior: StableCascadeUNet, *texts: TextEmbeddings, seeds: tuple[int, ...] = (1,), **options: Any) -> Tensor:
    return finish(prior_steps(prior, *texts, size=SIZE, noise=Noise(seeds), **{"steps": 3, **options}))


def test_shape_steps_and_dtype(prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings]) -> None:
    steps = list(prior_steps(prior, *texts, size=SIZE, noise=Noise([1, 2]), steps=3))
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    for step in steps:
        assert step.x.shape == step.x0.shape == (2, 16, *SIZE)
        assert step.x.dtype == torch.float32
        assert not step.x.requires_grad
    assert steps[0].t == pytest.approx(0.9936, abs=1e-4)


def test_one_forward_a_step_and_conditions_once(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = count_calls(prior, monkeypatch)
    make(prior, *texts, seeds=(1, 2))
    assert forwards == [4, 4, 4]  # both halves of two images in one batch


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_no_unconditional_half(
    prior: StableCascadeUNet,
    texts: tuple[TextEmbeddings, TextEmbeddings],
    monkeypatch: pytest.MonkeyPatch,
    guidance: float,
) -> None:
    forwards = count_calls(prior, monkeypatch)
    tokens = count_calls(prior.clip_txt_mapper, monkeypatch)
    alone = make(prior, texts[0], guidance=guidance)
    assert forwards == [1, 1, 1]
    assert tokens == [1]
    assert torch.equal(alone, make(prior, *texts, guidance=guidance))


def test_conditions_are_computed_once_for_both_halves(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = count_calls(prior.clip_txt_mapper, monkeypatch)
    make(prior, *texts, seeds=(1, 2))
    assert tokens == [4]


def test_texts_and_guidance_matter(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], components: dict[str, Any]
) -> None:
    other = TextEncoder(components["tokenizer"], components["text_encoder"]).encode(["fog"])
    results = [
        make(prior, *texts),
        make(prior, other, texts[1]),
        make(prior, texts[0], other),
        make(prior, *texts, guidance=8.0),
        make(prior, *texts, rescale=0.0),
        make(prior, *texts, shift=1.0),
        make(prior, *texts, sampler="ddim"),
        make(prior, *texts, seeds=(2,)),
        make(prior, *texts, image=torch.ones(1, 1, 12)),
        make(prior, *texts, image=torch.ones(1, 2, 12)),
    ]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert not torch.allclose(first, second, rtol=1e-3)


def test_a_picture_does_not_depend_on_how_long_the_other_texts_are(
    prior: StableCascadeUNet, components: dict[str, Any]
) -> None:
    """Each text counts at its own length, whatever the other texts in its batch."""
    encoder = TextEncoder(components["tokenizer"], components["text_encoder"])
    texts = encoder.encode_each(["a cat", "a dog" * 60, "fog" * 30])
    negatives = encoder.encode_each(["snow" * 40, "", "rain"])
    together = make(prior, joined(texts), joined(negatives), seeds=(1, 2, 3))
    for i, seed in enumerate((1, 2, 3)):
        alone = make(prior, texts[i], negatives[i], seeds=(seed,))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-3)
    # Without guidance there is no negative prompt to share a batch with.
    first, second = (make(prior, joined(texts[:end]), seeds=(1, 2)[:end], guidance=1.0) for end in (1, 2))
    torch.testing.assert_close(second[:1], first, rtol=1e-4, atol=1e-3)


def test_image_prompt_of_zeros_is_no_image_prompt(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings]
) -> None:
    torch.testing.assert_close(make(prior, *texts, image=torch.zeros(1, 1, 12)), make(prior, *texts))


def test_an_image_does_not_depend_on_its_batch(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings]
) -> None:
    together = make(prior, *texts, seeds=(1, 2, 3))
    for i, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(together[i : i + 1], make(prior, *texts, seeds=(seed,)), rtol=1e-4, atol=1e-3)


def test_latents_and_times_are_float32_in_a_bfloat16_network(
    components: dict[str, Any], texts: tuple[TextEmbeddings, TextEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    half = copy.deepcopy(components["prior"]).to(torch.bfloat16)
    seen = []
    forward = half.forward

    def watched(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return forward(x, t, *args, **kwargs)

    monkeypatch.setattr(half, "forward", watched)
    assert make(half, *texts).dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32)}


def test_strength_decides_how_much_of_the_start_is_left(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings]
) -> None:
    start = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(9))
    differences = [
        (make(prior, *texts, seeds=(1, 2), start=start, strength=strength, steps=10) - start).std()
        for strength in (0.05, 0.2, 0.5, 0.8, 1.0)
    ]
    assert differences[0] < 0.5
    assert differences == sorted(differences)


def test_start_is_noised_at_the_shift_of_sampling(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(9))
    seen = []
    forward = prior.forward

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x)
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(prior, "forward", watched)
    steps = list(
        prior_steps(prior, *texts, size=SIZE, noise=Noise([1]), steps=20, start=start, strength=0.8, shift=2.0)
    )
    assert len(steps) == 16
    expected = diffuse(start, Noise([1])(16, *SIZE), torch.tensor(0.8), shift=2.0)
    torch.testing.assert_close(seen[0][:1], expected)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
def test_latents_that_are_not_free_are_the_start_s_at_every_step(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], sampler: str
) -> None:
    start = torch.randn(1, 16, *SIZE, generator=torch.Generator().manual_seed(9))
    free = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
    free[..., 1, 2:] = True
    options = {"size": SIZE, "steps": 10, "start": start, "strength": 0.7, "sampler": sampler}
    steps = list(prior_steps(prior, *texts, noise=Noise([1, 2]), free=free, **options))
    noise = Noise([1, 2])(16, *SIZE)
    times = torch.linspace(0.7, 0, 8)[1:]
    for step, t in zip(steps, times, strict=True):
        known = diffuse(start.expand(2, -1, -1, -1), noise, t, shift=2.0)
        torch.testing.assert_close(torch.where(free, 0, step.x), torch.where(free, 0, known))
        assert (torch.where(free, step.x, known) != known).any()
    assert (steps[-1].x - start)[~free.expand(2, 16, -1, -1)].std() < 0.03  # the noise that the schedule leaves
    everything = finish(prior_steps(prior, *texts, noise=Noise([1, 2]), free=torch.ones_like(free), **options))
    assert torch.equal(everything, finish(prior_steps(prior, *texts, noise=Noise([1, 2]), **options)))


@pytest.mark.parametrize(
    ("span", "steps", "active"),
    [
        ((0.0, 1.0), 5, [0, 1, 2, 3, 4]),
        ((0.0, 0.5), 3, [0, 1]),
        ((0.5, 1.0), 3, [2]),
        ((0.2, 0.6), 10, [2, 3, 4, 5]),
        ((0.0, 0.01), 10, [0]),
        ((0.95, 1.0), 10, []),
    ],
)
def test_residuals_are_added_in_their_steps(span: tuple[float, float], steps: int, active: list[int]) -> None:
    """Keys and shapes are equal in all steps, with zeros in other steps."""
    blocks = {0: torch.rand(1, 2, *SIZE), 3: torch.rand(1, 2, *SIZE)}
    by_step = residuals_by_step([Residuals(blocks, 0.5, *span)], steps, SIZE, 4)
    for step, added in enumerate(by_step):
        assert list(added) == [0, 3]
        for k, one in added.items():
            assert one.shape == (4, 2, *SIZE)
            expected = 0.5 * blocks[k] if step in active else torch.zeros_like(blocks[k])
            torch.testing.assert_close(one, expected.expand(4, -1, -1, -1))


def test_residuals_of_several_controls_are_summed() -> None:
    """Each is resized to the latents' size. A ResBlock may have residuals of only one control."""
    fine, coarse = torch.rand(1, 2, 6, 10), torch.rand(1, 2, 2, 2)
    controls = [Residuals({0: fine, 1: fine}, 0.5), Residuals({1: coarse, 2: coarse}, 2.0, start=0.5)]
    first, second = residuals_by_step(controls, 2, SIZE, 1)
    small, large = (
        torch.nn.functional.interpolate(one, SIZE, mode="bilinear", align_corners=True) for one in (fine, coarse)
    )
    for added, share in ((first, 0.0), (second, 2.0)):
        torch.testing.assert_close(added, {0: 0.5 * small, 1: 0.5 * small + share * large, 2: share * large})


def test_residuals_reach_both_halves_and_every_image(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = prior.forward

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((x.shape[0], kwargs["controlnet_residuals"]))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(prior, "forward", watched)
    blocks = {0: torch.rand(1, 16, *SIZE), 2: torch.rand(1, 16, *SIZE)}
    with_control = make(prior, *texts, seeds=(1, 2), controls=[Residuals(blocks, 1.0, 0.0, 0.5)])
    assert len(seen) == 3
    for step, (batch, added) in enumerate(seen):
        assert batch == 4
        for k, residual in blocks.items():
            expected = residual if step < 2 else torch.zeros_like(residual)
            assert torch.equal(added[k], expected.expand(4, -1, -1, -1))
    assert not torch.allclose(with_control, make(prior, *texts, seeds=(1, 2)), rtol=1e-2)


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(20, 1.0, 20), (20, 0.8, 16), (20, 0.55, 11), (100, 0.29, 29), (10, 0.79, 7), (20, 0.01, 1), (1, 0.5, 1)],
)
def test_steps_taken(steps: int, strength: float, taken: int) -> None:
    """The authors take int(20 * 0.8) = 16 steps. In floating point, 100 * 0.29 is a little less than 29."""
    assert steps_taken(steps, strength) == taken


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 0.5}, "strength is 0.5, but there is no start"),
        ({"start": torch.zeros(1, 16, *SIZE), "strength": 0.0}, "strength is 0.0; it must be above 0"),
        ({"start": torch.zeros(1, 16, 4, 4)}, r"start has the shape \(1, 16, 4, 4\); it must be \(1 or 1, 16, 3, 5\)"),
        ({"steps": 0}, "steps is 0"),
        ({"free": torch.ones(1, 1, *SIZE).bool()}, "free needs start, which has the latents that are kept"),
    ],
)
def test_wrong_arguments_are_refused(
    prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(prior, *texts, **wrong)


def test_guidance_needs_a_negative(prior: StableCascadeUNet, texts: tuple[TextEmbeddings, TextEmbeddings]) -> None:
    with pytest.raises(ValueError, match=r"guidance is 4.0; above 1 it needs negative embeddings"):
        make(prior, texts[0])
