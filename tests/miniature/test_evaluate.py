import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from miniature.compose import compose
from miniature.evaluate import (
    Verdict,
    fidelity,
    pictures_by_stage,
    score_pictures,
    score_verdicts,
    text_to_pictures,
)
from miniature.icons import STYLES, load_objects
from miniature.judge import Judge
from miniature.prompts import Prompt, make_prompts, plans_of
from miniature.scenes import COLOUR_NAMES, HeldOut
from miniature.sheets import sheet
from miniature.stage_a import decode
from tests.tiny import make_cascade
from training.pictures import psnr

NAMES = [item.name for item in load_objects()]


@pytest.fixture(scope="module")
def tiny(components: Mapping[str, object]) -> Cascade:
    return make_cascade(components)


def drawings() -> torch.Tensor:
    """Ten objects of coarse random colours in three styles."""
    coarse = torch.rand(30, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    coarse = torch.cat([coarse, torch.ones(30, 1, 6, 6)], 1)
    return (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).byte()


@pytest.mark.parametrize(("count", "single", "double"), [(700, 500, 200), (70, 50, 20), (9, 6, 3), (4, 3, 1)])
def test_a_set_has_as_many_unseen_prompts_as_it_should(count: int, single: int, double: int) -> None:
    prompts = make_prompts(NAMES, STYLES, 3, count)
    held_out = HeldOut.of(NAMES)
    assert [len(prompt.objects) for prompt in prompts] == [1] * single + [2] * double
    for size, expected in ((1, single // 2), (2, double // 2)):
        assert sum(prompt.unseen for prompt in prompts if len(prompt.objects) == size) == expected
    assert len({prompt.seed for prompt in prompts}) == count
    for prompt in prompts:
        objects = [NAMES.index(name) for name in prompt.objects]
        assert all(name in prompt.text for name in prompt.objects)
        if len(objects) == 2:
            assert held_out.pairs[objects[0], objects[1]] == prompt.unseen
        else:
            colours = [COLOUR_NAMES.index(name) for name in prompt.colours or ()]
            assert held_out.colours[objects[0], colours].any() == prompt.unseen
        Request(prompt.text, seed=prompt.seed)


def test_a_seed_decides_a_set_and_neighbouring_sets_have_nothing_in_common() -> None:
    first, again, other = (make_prompts(NAMES, STYLES, seed) for seed in (5, 5, 6))
    assert first == again
    assert not {prompt.seed for prompt in first} & {prompt.seed for prompt in other}
    shared = {(p.text, p.objects) for p in first} & {(p.text, p.objects) for p in other}
    assert len(shared) <= 10  # as many as chance has it


def test_prompts_give_their_scenes_back() -> None:
    prompts = make_prompts(NAMES, STYLES, 5, 60)
    plans = plans_of(prompts, NAMES, STYLES)
    for i, prompt in enumerate(prompts):
        assert tuple(NAMES[k] for k in plans.objects[i] if k >= 0) == prompt.objects
        assert tuple(COLOUR_NAMES[k] for k in plans.colours[i]) == (prompt.colours or ("white", "white"))
        assert plans.says_style[i] == (prompt.style is not None)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.slow
def test_true_scenes_score_highly_and_wrong_ones_do_not() -> None:
    names = NAMES[:10]
    prompts = make_prompts(names, STYLES, 5, 56)
    scenes = [to_image(scene) for scene in compose(drawings(), plans_of(prompts, names, STYLES))]
    judge = Judge(drawings(), names, STYLES)
    scores, verdicts = score_pictures(judge, scenes, scenes, prompts)
    assert [verdict.prompt for verdict in verdicts] == prompts
    assert min(mean(scores[name]) for name in ("object first", "background", "both objects first")) >= 0.95
    assert scores["sharpness"] == [1.0] * sum(prompt.style is not None for prompt in prompts)

    wrong = list(scenes)
    random.Random(0).shuffle(wrong)
    scores, _ = score_pictures(judge, wrong, scenes, prompts)
    assert mean(scores["object first"]) < 0.4
    assert mean(scores["background"]) < 0.5


@pytest.mark.slow
def test_sharpness_falls_with_a_blur() -> None:
    names = NAMES[:10]
    prompts = [prompt for prompt in make_prompts(names, STYLES, 5, 28) if prompt.style]
    scenes = [to_image(scene) for scene in compose(drawings(), plans_of(prompts, names, STYLES))]
    judge = Judge(drawings(), names, STYLES)
    means = []
    for radius in (0, 1, 2, 4):
        blurred = [scene.filter(ImageFilter.GaussianBlur(radius)) for scene in scenes]
        means.append(mean(score_pictures(judge, blurred, scenes, prompts)[0]["sharpness"]))
    assert means == sorted(means, reverse=True)
    assert means[0] == 1.0
    assert means[-1] < 0.6


def verdict(ranks: tuple[int, ...], background: bool | None, unseen: bool) -> Verdict:
    prompt = Prompt("", 0, ("cat",) * len(ranks), None, None, None, "center", None, None, unseen)
    return Verdict(prompt, ranks, background)


def test_scores_are_what_was_asked() -> None:
    verdicts = [
        verdict((0,), True, False),
        verdict((4,), None, False),
        verdict((5,), False, True),
        verdict((0, 3), None, True),
    ]
    scores = score_verdicts(verdicts)
    assert scores["object first"] == [1, 0, 0]
    assert scores["object in 5"] == [1, 1, 0]
    assert scores["object in 5, unseen"] == [0]
    assert scores["background"] == [1, 0]
    assert scores["both objects in 5"] == [1]
    assert scores["both objects first"] == [0]
    assert "both objects first, seen" not in scores


@pytest.mark.slow
def test_every_picture_is_what_the_engine_makes_alone(tiny: Cascade) -> None:
    """To the bit but for text, of which pictures are made several at a time."""
    prompts = make_prompts(NAMES[:10], STYLES, 5, 6)
    scenes = [to_image(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(i))) for i in range(6)]
    made = pictures_by_stage(tiny, scenes, prompts)
    assert made["scenes"] == scenes
    for prompt, scene, restored, painted, drawn in zip(prompts, *made.values(), strict=True):
        with torch.no_grad():
            expected = tiny.vqgan(to_pixels(scene)).clamp(0, 1)
        assert psnr(to_pixels(restored), expected) > 45
        assert painted.tobytes() == tiny.reconstruct(scene, prompt.seed, prompt.text).tobytes()
        (alone,) = tiny.generate(Request(prompt.text, seed=prompt.seed))
        assert np.abs(np.asarray(drawn, int) - np.asarray(alone, int)).max() <= 1
    (stronger, *_) = text_to_pictures(tiny, prompts, guidance_scale_prior=8.0)
    (alone,) = tiny.generate(Request(prompts[0].text, seed=prompts[0].seed, guidance_scale_prior=8.0))
    assert np.abs(np.asarray(stronger, int) - np.asarray(alone, int)).max() <= 1


def test_fidelity_is_measured_on_unseen_scenes(tiny: Cascade) -> None:
    prompts = make_prompts(NAMES[:10], STYLES, 5, 6)
    gray, lighter = (Image.new("RGB", (8, 8), (level,) * 3) for level in (100, 110))
    made = {"scenes": [gray] * 6, "A": [lighter] * 6, "B + A": [gray] * 6}
    values = fidelity(made, prompts)
    assert len(values["A"]) == sum(prompt.unseen for prompt in prompts)
    assert values["A"][0] == pytest.approx(20 * math.log10(255 / 10), abs=1e-3)
    assert values["B + A"][0] == 100


def test_latents_of_stage_b_become_pictures(tiny: Cascade) -> None:
    *_, last, image = tiny.steps(Request("a cat", seed=1))
    assert last.stage == "decoder"
    (decoded,) = decode(tiny, last.latents)
    assert np.abs(np.asarray(decoded, int) - np.asarray(image.image, int)).mean() < 2  # a last step's noise apart


def test_sheet() -> None:
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    assert sheet([gray] * 5, 3).size == (24, 16)
    captioned = sheet([gray] * 5, 3, ["a cat", *["a very long caption of two lines"] * 4])
    assert captioned.size == (3 * 256 + 2 * 20, 2 * (256 + 60) + 20)
    assert captioned.getpixel((0, 0)) == captioned.getpixel((255, 255)) == (128, 128, 128)
    below = [np.asarray(captioned.crop((left, 256, left + 256, 316))) for left in (0, 276)]
    assert below[0].min() < 128 < 255 == below[0][35:].min()
    assert below[1][35:].min() < 128
