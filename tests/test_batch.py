"""Several prompts in one batch: the pictures of each alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Cascade, Control, Progress, Request
from cascade.limits import InputError
from tests.tiny import count_calls, make_cascade

SMALL = {"width": 72, "height": 64, "steps_prior": 2, "steps_decoder": 2}
PROMPTS = (
    Request("a cat", seed=3, **SMALL),
    Request("two dogs", "rain", seed=11, num_images=2, **SMALL),
    Request("", seed=0, **SMALL),
)
PHOTO = Image.linear_gradient("L").resize((72, 64))
MASK = Image.new("L", (72, 64))
MASK.paste(255, (0, 0, 40, 64))


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def read(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def latents(seen: list[Progress], stage: str) -> torch.Tensor:
    """Of the last step of one batch."""
    return [progress.latents for progress in seen if progress.stage == stage][-1]


@pytest.mark.parametrize(
    "common",
    [
        {},
        {"guidance_scale_prior": 1, "guidance_scale_decoder": 1, "sampler": "ddim"},
        {"image_prompts": [PHOTO, MASK], "controls": [Control("canny", PHOTO)]},
        {"image": PHOTO, "prompt_strength": 0.5},
        {"image": PHOTO, "prompt_strength": 0},
        {"image": PHOTO, "mask": MASK, "prompt_strength": 1},
    ],
    ids=["text", "no guidance", "image prompts and a control", "image", "strength 0", "mask"],
)
def test_pictures_are_those_of_each_request_alone(cascade: Cascade, common: dict[str, Any]) -> None:
    requests = [replace(request, **common) for request in PROMPTS]
    together: list[Progress] = []
    images = cascade.batch(requests, together.append)
    assert [len(made) for made in images] == [1, 2, 1]
    assert together[-1].done == together[-1].total
    alone: list[list[Progress]] = [[] for _ in requests]
    for request, made, seen in zip(requests, images, alone, strict=True):
        for one, other in zip(made, cascade.generate(request, seen.append), strict=True):
            assert np.abs(read(one) - read(other)).max() <= 1
    for stage in ("prior", "decoder") if common.get("prompt_strength") != 0 else ("decoder",):
        expected = torch.cat([latents(seen, stage) for seen in alone])
        assert (latents(together, stage) - expected).norm() <= 1e-5 * expected.norm()
    assert len({image.tobytes() for made in images for image in made}) == 4


def test_as_many_at_a_time_as_fit(cascade: Cascade, components: dict[str, Any]) -> None:
    """A batch begins and ends within a request."""
    few = make_cascade(components, max_batch=2)
    requests = [replace(PROMPTS[0], num_images=3), replace(PROMPTS[1], num_images=2)]
    for made, expected in zip(few.batch(requests), cascade.batch(requests), strict=True):
        for one, other in zip(made, expected, strict=True):
            assert np.abs(read(one) - read(other)).max() <= 1


def test_prompts_share_their_steps(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = count_calls(cascade.prior, monkeypatch)
    decoder = count_calls(cascade.decoder, monkeypatch)
    cascade.batch([replace(PROMPTS[0], guidance_scale_decoder=1), replace(PROMPTS[2], guidance_scale_decoder=1)])
    assert prior == [4, 4]  # two pictures, with and without the prompt
    assert decoder == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, "requests[2].width is 64, but requests[0].width is 72; "),
        ({"sampler": "lcm"}, "requests[2].sampler is 'lcm', but requests[0].sampler is 'default'; "),
        ({"steps_prior": None}, "requests[2].steps_prior is None, but requests[0].steps_prior is 2; "),
        ({"guidance_scale_prior": 0}, "requests[2].guidance_scale_prior is 0.0, but requests[0]."),
        (
            {"image": Image.new("L", (72, 64))},
            "requests[2].image is an image of 72x64 pixels, but requests[0].image is another; ",
        ),
    ],
)
def test_what_differs_is_named(cascade: Cascade, change: dict[str, Any], message: str) -> None:
    common = {"image": PHOTO} if "image" in change else {}
    requests = [replace(request, **common) for request in PROMPTS]
    requests[2] = replace(requests[2], **change)
    with pytest.raises(InputError) as error:
        cascade.batch(requests)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("may differ in prompt, negative_prompt, seed and num_images only.")


def test_equal_images_are_no_difference(cascade: Cascade) -> None:
    requests = [replace(PROMPTS[0], image=PHOTO), replace(PROMPTS[2], image=PHOTO.copy())]
    assert len(cascade.batch(requests)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PROMPTS[0], "requests is one Request; it must be a list of them."),
        ([PROMPTS[0], "a cat"], "requests[1] is 'a cat'; it must be a Request, such as Request('a cat')."),
    ],
)
def test_what_is_no_request(cascade: Cascade, wrong: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        cascade.batch(wrong)
    assert str(error.value) == message


def test_nothing_of_nothing(cascade: Cascade) -> None:
    assert cascade.batch([]) == []
