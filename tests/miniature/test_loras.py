"""What the miniature's LoRAs learn, and how they are judged: true scenes get full marks, others none."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.images.tensors import to_image
from miniature import evaluate_loras
from miniature.captions import Captioner
from miniature.compose import compose
from miniature.evaluate_loras import judge_style, judge_subject
from miniature.icons import IconObject, load_drawings, pack_drawings
from miniature.loras import (
    NEW_BACKGROUNDS,
    STYLE,
    UNTRAINED,
    WORD,
    style_plans,
    subject_drawing,
    subject_plans,
    write_style,
    write_subject,
)
from miniature.scenes import COLOUR_NAMES, SIZE_NAMES
from tests.miniature.small import ellipse, pack, quick_packing
from training.lora.pictures import captioned_pictures, find_pictures
from training.lora.settings import read_recipe

NAMES = ["apple", "bus", "cat", "dog", "egg", "fox", "goat"]
RECIPES = Path(__file__).parent.parent.parent / "miniature"


@pytest.fixture(scope="module")
def inks(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    file = tmp_path_factory.mktemp("inks") / "ink.zip"
    drawn = {name: ellipse(4 + index % 6, 0, 3 * index) for index, name in enumerate(NAMES)}
    with quick_packing():
        pack_drawings([IconObject(name, (name,)) for name in NAMES], [drawn], file, (STYLE.style,))
    drawings, names, styles = load_drawings(file)
    assert (names, styles) == (NAMES, ["ink"])
    return drawings


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return load_drawings(pack(NAMES, tmp_path_factory.mktemp("drawings") / "drawings.zip"))[0]


def test_zips_are_what_training_takes(inks: torch.Tensor, tmp_path: Path) -> None:
    write_style(tmp_path / "ink.zip", inks, NAMES, count=6)
    write_subject(tmp_path / "pim.zip", count=4)
    for name, count, word in (("ink", 6, "ink"), ("pim", 4, WORD)):
        folder = find_pictures(tmp_path / f"{name}.zip", tmp_path / name)
        found = captioned_pictures(folder, 256, caption="", prefix="", word="")
        assert len(found) == count
        assert all(word in one.caption and one.size == (256, 256) for one in found)
        recipe = read_recipe(RECIPES / f"{name}.toml")
        assert not recipe.lora.learns_a_word or recipe.lora.word == WORD
    with zipfile.ZipFile(tmp_path / "pim.zip") as archive:
        assert len(archive.namelist()) == 8


def test_what_is_judged_was_not_trained() -> None:
    assert not set(style_plans(NAMES, 9, 1, trained=True).objects[:, 0] % UNTRAINED == 0) & {True}
    assert set(style_plans(NAMES, 9, 1, trained=False).objects[:, 0]) <= {0, 5}
    new = {COLOUR_NAMES[index] for index in subject_plans(30, 1, new=True).colours.flatten()}
    seen = {COLOUR_NAMES[index] for index in subject_plans(12, 1, new=False).colours.flatten()}
    balanced = subject_plans(12, 1, new=False, balanced=True)
    assert ((balanced.places > 0) | (balanced.size_names == SIZE_NAMES.index("small"))).sum() == 6
    assert new <= set(NEW_BACKGROUNDS)
    assert not seen & set(NEW_BACKGROUNDS)


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_true_scenes_get_full_marks(
    right: bool, inks: torch.Tensor, drawings: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures come from the drawings instead of the model: with LoRAs true ones, or flat ones of another object."""
    scenes: list[tuple[str, Image.Image]] = []

    def captions_of(plans: object, names: list[str], seed: int) -> list[str]:
        made = subject_drawing() if names == [WORD] else inks
        if not right:
            made = drawings[2::3] if names != [WORD] else drawings[:1]
        scenes[:] = [(str(i), to_image(one)) for i, one in enumerate(compose(made, plans, 1))]
        return [name for name, _ in scenes]

    def pictures_of(cascade: object, prompts: list[str], seed: int, lora: Path | None) -> list[Image.Image]:
        return [dict(scenes).get(prompt, scenes[0][1]) for prompt in prompts]

    monkeypatch.setattr(evaluate_loras, "captions_of", captions_of)
    monkeypatch.setattr(evaluate_loras, "pictures_of", pictures_of)

    class OnCpu:
        device = torch.device("cpu")

    style = judge_style(OnCpu(), tmp_path, drawings, inks, NAMES, 3, 20)
    subject, others = judge_subject(OnCpu(), tmp_path, drawings, NAMES, 3, 6, 8)
    assert {name: len(values) for name, values in style.items()} == {
        "style first": 20,
        "style first, trained": 10,
        "style first, untrained": 10,
        "object first": 20,
        "object first, trained": 10,
        "object first, untrained": 10,
    }
    assert np.mean(style["style first"]) == right
    assert np.mean(subject["subject first"]) == right
    assert len(subject["subject first"]) == 6
    assert len(others["with"]["object first"]) == len(others["without"]["object first"]) == 8
    if right:
        assert np.mean(style["object first"]) == 1


def test_captions_name_the_style() -> None:
    captions = Captioner(NAMES, ["ink"])
    assert captions.styles[0][0] == ("ink", "ink style")
