import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from miniature.compose import compose
from miniature.evaluate import (
    Prompt,
    Verdict,
    doubt,
    evaluate,
    generate_batch,
    load_prompts,
    make_prompts,
    plans_of,
    save_prompts,
    sheet,
    stage_pictures,
    summarise,
    table,
)
from miniature.icons import STYLES, load_objects
from miniature.judge import Judge
from miniature.scenes import COLOUR_NAMES, HeldOut
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


def test_fixed_prompts_are_as_many_and_as_unseen_as_they_should_be() -> None:
    prompts = load_prompts()
    held_out = HeldOut.of(NAMES)
    assert len({prompt.seed for prompt in prompts}) == len(prompts) == 600
    for size, count in ((1, 500), (2, 100)):
        chosen = [prompt for prompt in prompts if len(prompt.objects) == size]
        assert len(chosen) == count
        assert sum(prompt.unseen for prompt in chosen) == count // 2
    for prompt in prompts:
        objects = [NAMES.index(name) for name in prompt.objects]
        assert all(name in prompt.text for name in prompt.objects)
        if len(objects) == 2:
            assert held_out.pairs[objects[0], objects[1]] == prompt.unseen
        else:
            colours = [COLOUR_NAMES.index(name) for name in prompt.colours or ()]
            assert held_out.colours[objects[0], colours].any() == prompt.unseen


def test_prompts_round_trip_and_give_their_scenes_back(tmp_path) -> None:
    prompts = make_prompts(NAMES, STYLES, 5, one=40, two=20)
    save_prompts(prompts, tmp_path / "prompts.json")
    assert load_prompts(tmp_path / "prompts.json") == prompts
    plans = plans_of(prompts, NAMES, STYLES)
    for i, prompt in enumerate(prompts):
        assert tuple(NAMES[k] for k in plans.objects[i] if k >= 0) == prompt.objects
        assert tuple(COLOUR_NAMES[k] for k in plans.colours[i]) == (prompt.colours or ("white", "white"))
        assert plans.says_style[i] == (prompt.style is not None)


def test_true_scenes_score_highly_and_wrong_ones_do_not() -> None:
    names = NAMES[:10]
    prompts = make_prompts(names, STYLES, 5, one=40, two=10)
    scenes = compose(drawings(), plans_of(prompts, names, STYLES))
    by_text = {prompt.text: to_image(scene) for prompt, scene in zip(prompts, scenes, strict=True)}
    judge = Judge(drawings(), names, STYLES)
    verdicts, pictures = evaluate(lambda texts, seeds: [by_text[text] for text in texts], judge, prompts, batch_size=16)
    scores = summarise(verdicts)
    assert len(pictures) == len(prompts)
    assert min(scores[name] for name in ("object first", "background", "both objects first")) >= 0.95

    wrong = list(by_text.values())
    random.Random(0).shuffle(wrong)
    shuffled = iter(wrong * 2)
    verdicts, _ = evaluate(lambda texts, seeds: [next(shuffled) for _ in texts], judge, prompts)
    assert summarise(verdicts)["object first"] < 0.4
    assert summarise(verdicts)["background"] < 0.5


def verdict(ranks: tuple[int, ...], background: bool | None, unseen: bool) -> Verdict:
    prompt = Prompt("", 0, ("cat",) * len(ranks), None, None, None, "center", None, None, unseen)
    return Verdict(prompt, ranks, background)


def test_scores_are_shares_of_what_was_asked() -> None:
    verdicts = [
        verdict((0,), True, False),
        verdict((4,), None, False),
        verdict((5,), False, True),
        verdict((0, 3), None, True),
    ]
    scores = summarise(verdicts)
    assert scores["object first"] == pytest.approx(1 / 3)
    assert scores["object in 5"] == pytest.approx(2 / 3)
    assert scores["object in 5, unseen"] == 0
    assert scores["background"] == 0.5
    assert scores["both objects in 5"] == 1
    assert scores["both objects first"] == 0
    assert "both objects first, seen" not in scores
    assert "| object first | 33.3 % |" in table({"all": scores})


def test_a_batch_of_prompts_gives_the_pictures_of_each_alone(tiny: Cascade) -> None:
    texts, seeds = ["a red apple", "an owl on blue", "pizza"], [3, 4, 9]
    for text, seed, picture in zip(texts, seeds, generate_batch(tiny, texts, seeds), strict=True):
        (alone,) = tiny.generate(Request(prompt=text, seed=seed))
        assert np.abs(np.asarray(picture, int) - np.asarray(alone, int)).max() <= 1


def test_stage_pictures_are_what_the_stages_leave(tiny: Cascade) -> None:
    scenes = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    made = stage_pictures(tiny, scenes, ["a", "b"], [1, 2])
    with torch.no_grad():
        expected = tiny.vqgan(scenes).clamp(0, 1)
    assert psnr(torch.cat([to_pixels(picture) for picture in made["A"]]), expected) > 45
    reconstructed = tiny.reconstruct(to_image(scenes[1]), seed=2, prompt="b")
    assert np.abs(np.asarray(made["B + A"][1], int) - np.asarray(reconstructed, int)).mean() < 3


def test_sheet() -> None:
    gray = Image.new("RGB", (8, 8), (128, 128, 128))
    assert sheet([gray] * 5, 3).size == (24, 16)


def test_scores_of_few_pictures_come_with_their_doubt() -> None:
    assert doubt(20, "prompts") == (
        "20 prompts: a score of so few can be off by up to 22 percentage points (95 % confidence)."
    )
    assert doubt(600, "prompts") == ""
