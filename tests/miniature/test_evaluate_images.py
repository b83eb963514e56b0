"""Scores of the uses of images: for pictures made without a model, right or wrong in one respect; and which requests a
model is given."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.guides.controls import Control
from cascade.images.tensors import to_pixels
from cascade.request import Request
from miniature.compose import background
from miniature.evaluate_images import (
    HEADINGS,
    STRENGTHS,
    Scene,
    canny,
    edge_f1,
    evaluate_images,
    image_to_image,
    inpainting,
    make_scenes,
    object_mask,
    off_centre,
    reconstruction,
    variation,
)
from miniature.icons import STYLES
from miniature.judge import Judge
from miniature.prompts import make_prompts
from miniature.scores import Values
from tests.miniature.test_evaluate import NAMES, drawings
from tests.tiny import make_cascade
from training.pictures import ssim

SIDE = 128


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(drawings(), NAMES[:10], STYLES)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    prompts = [prompt for prompt in make_prompts(NAMES[:10], STYLES, 5, 28) if len(prompt.objects) == 1]
    return make_scenes(prompts, drawings(), NAMES[:10], STYLES, SIDE)


def means(values: Values) -> dict[str, float]:
    return {name: sum(each) / len(each) for name, each in values.items()}


def lines(*columns: int) -> torch.Tensor:
    edges = torch.zeros(20, 20, dtype=torch.bool)
    edges[:, list(columns)] = True
    return edges


@pytest.mark.parametrize(
    ("made", "true", "expected"),
    [
        (lines(3, 9), lines(3, 9), 1.0),
        (lines(5), lines(3), 1.0),
        (lines(6), lines(3), 0.0),
        (lines(3, 12), lines(3), 2 / 3),  # half of the edges are right, and all are there
        (lines(3), lines(3, 12), 2 / 3),
        (lines(), lines(3), 0.0),
        (lines(3), lines(), 0.0),
        (lines(), lines(), 1.0),
    ],
)
def test_edges_agree_within_two_pixels(made: torch.Tensor, true: torch.Tensor, expected: float) -> None:
    assert edge_f1(made, true, 2) == pytest.approx(expected)


def test_masks_leave_nothing_but_background(scenes: list[Scene]) -> None:
    for scene in scenes:
        (ground,) = background(scene.plan, (SIDE, SIDE))
        different = (to_pixels(scene.image)[0] - ground).abs().amax(dim=0) > 1 / 255
        inside = torch.from_numpy(np.asarray(object_mask(scene)) > 0)
        assert different.any()
        assert not different[~inside].any()
        assert 0.1 < inside.float().mean() < 0.9


def test_other_and_quiet_prompts_say_what_they_should(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.other_name in scene.other
        assert scene.other_name != scene.prompt.objects[0]
        assert scene.prompt.objects[0] in scene.quiet
        for word in ("style", "3D", "flat", "cartoon", "small", "large", "corner", "at the", "side"):
            assert word not in scene.quiet.split(" background")[0]
    assert any(scene.prompt.size or scene.prompt.place != "center" for scene in scenes)


def test_copies_score_in_full_and_other_pictures_do_not(scenes: list[Scene], judge: Judge) -> None:
    (column,) = variation(lambda request: request.image_prompts[0], judge, scenes).scores.values()
    assert means(column) == {"object first": 1.0, "object in 5": 1.0}
    (column,) = reconstruction(lambda image: image, judge, scenes).scores.values()
    assert means(column) == {"object first": 1.0, "object in 5": 1.0}
    shifted = {id(scene.image): scenes[i - 1].image for i, scene in enumerate(scenes)}
    (column,) = reconstruction(lambda image: shifted[id(image)], judge, scenes).scores.values()
    assert means(column)["object first"] < 0.3


@pytest.mark.slow
def test_similarity_falls_where_more_is_painted_anew(scenes: list[Scene], judge: Judge) -> None:
    """Pictures that fade to gray."""
    asked = []

    def fade(request: Request) -> Image.Image:
        asked.append((request.prompt, request.prompt_strength))
        return Image.blend(
            request.image, Image.new("RGB", request.image.size, (128, 128, 128)), request.prompt_strength
        )

    outcome = image_to_image(fade, judge, scenes)
    quiet = [(scene.quiet, strength) for strength in STRENGTHS for scene in scenes]
    assert asked == quiet + [(scene.prompt.text, 0.2) for scene in scenes]
    *columns, full = outcome.scores.values()
    similarity = [means(column)["similarity"] for column in columns]
    assert len(similarity) == len(STRENGTHS)
    assert (np.diff(similarity) < 0).all()
    assert full == columns[0]
    assert means(full)["object first"] == 1.0
    assert means(full)["similarity"] == pytest.approx(
        np.mean(
            [
                ssim(to_pixels(p), to_pixels(s.image))
                for p, s in zip(outcome.pictures["image-to-image 0.2"], scenes, strict=True)
            ]
        )
    )


def test_inpainting_counts_the_other_object_and_whatever_changed_outside(scenes: list[Scene], judge: Judge) -> None:
    prompts = [replace(scene.prompt, objects=(scene.other_name,)) for scene in scenes]
    right = {
        s.other: o.image
        for s, o in zip(scenes, make_scenes(prompts, drawings(), NAMES[:10], STYLES, SIDE), strict=True)
    }

    def paint(request: Request) -> Image.Image:
        return Image.composite(right[request.prompt], request.image, request.mask)

    (column,) = inpainting(paint, judge, scenes).scores.values()
    assert means(column) == {"object first": 1.0, "object in 5": 1.0, "changed outside": 0.0}

    def spill(request: Request) -> Image.Image:
        picture = request.image.copy()
        if request.prompt == scenes[0].other:
            row, column = np.argwhere(np.asarray(request.mask) == 0)[0].tolist()
            picture.putpixel((column, row), (1, 2, 3))
        return picture

    (column,) = inpainting(spill, judge, scenes).scores.values()
    assert column["changed outside"] == [1.0] + [0.0] * (len(scenes) - 1)
    assert means(column)["object first"] < 0.3


def test_canny_compares_with_and_without_on_scenes_that_prompts_leave_open(scenes: list[Scene]) -> None:
    def follow(request: Request) -> Image.Image:
        if not request.controls:
            return Image.new("RGB", (SIDE, SIDE))
        (control,) = request.controls
        assert control.kind == "canny"
        return control.image

    open_scenes = off_centre(scenes)
    outcome = canny(follow, lambda image: image, open_scenes)
    assert {name: means(column)["edges"] for name, column in outcome.scores.items()} == {
        "with ControlNet": 1.0,
        "without": 0.0,
        "true latents": 1.0,
    }
    assert open_scenes == [scene for scene in scenes if scene.prompt.size or scene.prompt.place != "center"]
    assert 0 < len(open_scenes) < len(scenes)
    assert outcome.pictures["canny with ControlNet"] == [scene.image for scene in open_scenes]


@pytest.mark.slow
@pytest.mark.parametrize("has_canny", [True, False])
def test_a_cascade_is_judged_by_the_pictures_that_it_makes(
    components: Mapping[str, object],
    scenes: list[Scene],
    judge: Judge,
    caplog: pytest.LogCaptureFixture,
    has_canny: bool,
) -> None:
    """Without a canny ControlNet, its score is left out, and a warning says so."""
    cascade = make_cascade({k: v for k, v in components.items() if has_canny or not k.startswith("controlnet_")})
    chosen = [scene for scene in scenes if scene.prompt.place != "center"][:2]
    outcomes = dict(evaluate_images(cascade, judge, chosen))
    made = {name: pictures for outcome in outcomes.values() for name, pictures in outcome.pictures.items()}
    scene = chosen[1]
    image, options = scene.image, {"seed": scene.prompt.seed}
    requests = {
        "variation": Request("", image_prompts=(image,), **options),
        "image-to-image 0.4": Request(scene.quiet, image=image, prompt_strength=0.4, **options),
        "inpainting": Request(scene.other, image=image, mask=object_mask(scene), **options),
    }
    if has_canny:
        requests["canny with ControlNet"] = Request(scene.quiet, controls=(Control("canny", image),), **options)
    for name, request in requests.items():
        assert made[name][1].tobytes() == cascade.generate(request)[0].tobytes(), name
    assert made["reconstruction"][1].tobytes() == cascade.reconstruct(image).tobytes()
    assert set(outcomes) == set(HEADINGS) - (set() if has_canny else {"canny"})
    assert ("no controlnet_canny" in caplog.text) != has_canny


def test_edges_are_left_out_without_scenes_that_leave_a_place_open(
    components: Mapping[str, object], scenes: list[Scene], judge: Judge
) -> None:
    chosen = [scene for scene in scenes if scene not in off_centre(scenes)][:1]
    assert chosen
    assert "canny" not in dict(evaluate_images(make_cascade(components), judge, chosen))
