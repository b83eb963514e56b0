"""Scores of the IP-Adapter: for pictures made without a model, right or wrong in one respect; and what a model is asked."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.images.tensors import to_image
from cascade.request import Request
from miniature.captions import article
from miniature.compose import compose
from miniature.evaluate_ip_adapter import (
    SCALES,
    SEEDS,
    USES,
    Case,
    ablate,
    evaluate,
    make_cases,
    report,
    save,
    ways_of,
)
from miniature.icons import STYLES
from miniature.judge import Judge
from miniature.scenes import COLOUR_NAMES, HeldOut, Plans, elsewhere, sample_plans, with_other_objects
from tests.miniature.test_evaluate import NAMES, drawings
from tests.tiny import make_cascade

SIDE = 128
TEN = NAMES[:10]
# A way names the reference; what is made of it is up to the test.
WAY = {"way": lambda image: {"image_prompts": (image,)}}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(drawings(), TEN, STYLES)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return make_cases(drawings(), TEN, STYLES, 3, 6, SIDE)


def draw(name: str, style: str, colour: str, place: int = 0) -> Image.Image:
    one = np.ones(1, int)
    plans = Plans.of(
        objects=np.array([[TEN.index(name), -1]]),
        styles=np.array([[STYLES.index(style)] * 2]),
        colours=np.array([[COLOUR_NAMES.index(colour)] * 2]),
        gradient_ways=0 * one,
        relations=-one,
        places=place * one,
        size_names=-one,
        says_style=one == 1,
        says_background=one == 1,
    )
    return to_image(compose(drawings(), plans, len(STYLES), (SIDE, SIDE))[0])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_cases_are_drawn_by_their_seed(cases: list[Case]) -> None:
    again, other = (make_cases(drawings(), TEN, STYLES, seed, 6, SIDE) for seed in (3, 4))
    assert [replace(one, image=None) for one in again] == [replace(one, image=None) for one in cases]
    assert [one.image.tobytes() for one in again] == [one.image.tobytes() for one in cases]
    assert [one.seed for one in other] != [one.seed for one in cases]
    assert all(one.other != one.name for one in cases)
    assert {one.style for one in make_cases(drawings(), TEN, STYLES, 3, 60, SIDE)} == set(STYLES)
    assert all(two.seed - one.seed == SEEDS for one, two in pairwise(cases))


@pytest.mark.slow
def test_who_does_all_right_gets_all(judge: Judge, cases: list[Case]) -> None:
    by_image = {one.image.tobytes(): one for one in cases}

    def generate(request: Request) -> list[Image.Image]:
        (image,) = request.image_prompts
        case = by_image[image.tobytes()]
        if request.prompt == article(case.other):
            return [draw(case.other, case.style, "white")]
        if request.prompt:
            assert request.prompt == article(f"{case.colour} background")
            return [draw(case.name, case.style, case.colour)]
        assert request.num_images == SEEDS
        return [draw(case.name, case.style, "white", place) for place in range(SEEDS)]

    outcomes = evaluate(generate, judge, cases, WAY)
    alone, background, other = (outcomes[use].scores["way"] for use in USES)
    assert mean(alone["object first"]) == mean(alone["object in 5"]) == mean(alone["drawing first"]) == 1
    assert 0 < mean(alone["likeness of 4 seeds"]) < 0.99
    assert {name: mean(values) for name, values in background.items()} == dict.fromkeys(background, 1)
    assert mean(other["prompt's object first"]) == mean(other["style"]) == 1
    assert mean(other["reference's object first"]) == 0
    said = report(outcomes, len(cases), 3)
    assert said.count("100.0 %") == 8


@pytest.mark.slow
def test_who_copies_the_reference(judge: Judge, cases: list[Case]) -> None:
    """Has its drawing, and neither the prompt's background nor its object, nor four different pictures."""
    outcomes = evaluate(lambda request: list(request.image_prompts) * request.num_images, judge, cases, WAY)
    alone, background, other = (outcomes[use].scores["way"] for use in USES)
    assert mean(alone["drawing first"]) == 1
    assert mean(alone["likeness of 4 seeds"]) > 0.999
    assert mean(background["object first"]) == 1
    assert mean(background["background"]) == mean(background["both"]) == 0
    assert mean(other["prompt's object first"]) == 0
    assert mean(other["reference's object first"]) == mean(other["likeness"]) == pytest.approx(1)


@pytest.mark.slow
def test_the_style_is_judged_by_itself(judge: Judge, cases: list[Case]) -> None:
    by_image = {one.image.tobytes(): one for one in cases}

    def generate(request: Request) -> list[Image.Image]:
        case = by_image[request.image_prompts[0].tobytes()]
        wrong = STYLES[(STYLES.index(case.style) + 1) % len(STYLES)]
        name = case.other if request.prompt == article(case.other) else case.name
        return [draw(name, wrong, "white")] * request.num_images

    outcomes = evaluate(generate, judge, cases, WAY)
    assert mean(outcomes["alone"].scores["way"]["object first"]) == 1
    assert mean(outcomes["alone"].scores["way"]["drawing first"]) == 0
    assert mean(outcomes["object"].scores["way"]["prompt's object first"]) == 1
    assert mean(outcomes["object"].scores["way"]["style"]) == 0


@pytest.mark.slow
def test_what_a_model_is_asked(judge: Judge, cases: list[Case], components: dict[str, Any], tmp_path: Path) -> None:
    """With a real, tiny model; the ablation tries each block alone, all but each, and each scale, and leaves no trace."""
    cascade = make_cascade(components, native_size=SIDE)
    asked: list[Request] = []

    def generate(request: Request) -> list[Image.Image]:
        asked.append(request)
        small = replace(request, num_images=1, steps_prior=1, steps_decoder=1)
        return cascade.generate(small) * request.num_images

    two = cases[:1]
    outcomes = evaluate(generate, judge, two, ways_of(cascade.ip_adapter))
    assert list(outcomes["alone"].scores) == ["native", "adapter", "adapter, style", "no image"]
    assert {one.seed for one in asked} == {two[0].seed}
    before = cascade.ip_adapter.config.style_blocks
    ablated = dict(ablate(generate, judge, two, cascade.ip_adapter))
    assert cascade.ip_adapter.config.style_blocks == before
    assert list(ablated["scales"].scores) == [f"{scale:g}" for scale in SCALES]
    assert list(ablated["blocks alone"].scores) == ["all", "0", "1", "3"]
    pictures = [one[0].tobytes() for one in ablated["blocks alone"].pictures.values()]
    assert len(set(pictures)) == len(pictures)
    save({**outcomes, **ablated}, two, 3, tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {
        "table.md",
        "scores.json",
        *(f"{name}.png" for name in (*USES, "scales", "blocks-alone", "blocks-left-out")),
    }


# ---- the pairs that training sees ----


def test_references_are_the_same_drawings_elsewhere() -> None:
    plans = sample_plans(2000, TEN, 0)
    other = elsewhere(plans, TEN, 1)
    assert np.array_equal(other.objects, plans.objects)
    assert np.array_equal(other.styles, plans.styles)
    two = plans.objects[:, 1] >= 0  # which are always of one size
    for name in ("colours", "centres", "sizes"):
        same = (getattr(other, name) == getattr(plans, name))[~two].reshape((~two).sum(), -1).all(1).mean()
        assert same < 0.4, name
    assert (other.relations[two] >= 0).all()
    assert (other.relations[~two] < 0).all()
    held_out = HeldOut.of(TEN).colours
    assert not held_out[other.objects[:, :1], other.colours].any()
    assert not held_out[other.objects[two, 1:], other.colours[two]].any()
    again = elsewhere(plans, TEN, 1)
    assert np.array_equal(again.centres, other.centres)


def test_other_objects_in_the_same_style() -> None:
    plans = sample_plans(500, TEN, 0)
    chosen = np.arange(500) % 3 == 0
    other = with_other_objects(plans, chosen, len(TEN), 1)
    assert (other.objects[chosen, 0] != plans.objects[chosen, 0]).all()
    assert np.array_equal(other.objects[~chosen], plans.objects[~chosen])
    assert np.array_equal(other.objects < 0, plans.objects < 0)
    assert np.array_equal(other.styles, plans.styles)
    assert torch.equal(torch.tensor(other.objects.max()), torch.tensor(9))
