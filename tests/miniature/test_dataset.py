"""The drawings as training data: what scenes show, and what a configuration can ask of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from miniature.dataset import Drawings, Scenes
from miniature.icons import load_drawings
from tests.miniature.small import DRAWN, pack
from tests.training.small import train, write_config
from training.tasks.tokenizer import train_tokenizer
from training.workshop import load_component

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_scenes_say_what_they_show(tmp_path: Path) -> None:
    names = ("apple", "pear", "plum", "fig")
    tokenizer = load_component(ROOT / "weights" / "mini", "tokenizer")
    drawn = load_drawings(pack(names, tmp_path / "drawings.zip"))
    options = {"size": (64, 64), "seed": 0, "split": "train", "device": torch.device("cpu")}
    scenes = Scenes(*drawn, 50, tokenizer, **options)
    assert sorted(scenes.names) == ["a fig", "a pear", "a plum", "an apple"]
    indices = torch.arange(50)
    shown = scenes.shown(indices)
    counts = (scenes.plans.objects >= 0).sum(axis=1)
    assert set(counts.tolist()) == {1, 2}
    assert np.array_equal(shown.sum(dim=1).numpy(), counts)
    for caption, row in zip(scenes.captions, shown, strict=True):
        for name, there in zip(scenes.names, row.tolist(), strict=True):
            assert (name.split()[-1] in caption) == there


@pytest.mark.slow
def test_pairs_for_the_ip_adapter(tmp_path: Path) -> None:
    """What references need leaves pictures as they are, and all captions but the nameless ones."""
    names = ("apple", "pear", "plum", "fig")
    tokenizer = load_component(ROOT / "weights" / "mini", "tokenizer")
    drawn = load_drawings(pack(names, tmp_path / "drawings.zip"))
    options = {"size": (64, 64), "seed": 0, "split": "train", "device": torch.device("cpu")}
    plain = Scenes(*drawn, 80, tokenizer, **options)
    paired = Scenes(*drawn, 80, tokenizer, **options, nameless=0.4, others=0.3)
    indices = torch.arange(80)
    same = paired.same_subject(indices)
    assert plain.same_subject(indices).all()
    assert 10 < (~same).sum() < 40
    assert torch.equal(paired.images(indices), plain.images(indices))
    nameless = [not any(name in caption for name in names) for caption in paired.captions]
    assert 15 < sum(nameless) < 50
    for quiet, one, two, alike in zip(nameless, paired.captions, plain.captions, same.tolist(), strict=True):
        assert not quiet or alike
        assert quiet or one == two
        assert not quiet or not one or "background" in one or "gradient" in one
    seen = paired.references(indices)
    assert seen.shape == (80, 3, 64, 64)
    assert (seen - paired.images(indices)).abs().mean() > 0.05
    drawn = torch.from_numpy(paired.reference_plans.objects == paired.plans.objects).all(dim=1)
    assert torch.equal(drawn, same)


@pytest.mark.slow
def test_both_splits_share_the_drawings(tmp_path: Path) -> None:
    drawings = Drawings(pack(("apple", "pear"), tmp_path / "drawings.zip"), scenes=2, unseen=2, seed=0)
    options = {"size": (64, 64), "device": torch.device("cpu")}
    tokenizer = train_tokenizer(drawings.captions(), 600)
    train, heldout = (drawings.dataset(split, tokenizer, **options) for split in ("train", "heldout"))
    assert train.drawings.data_ptr() == heldout.drawings.data_ptr()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "data.scene = 3",
            "[data] has an unknown name scene; it may hold size, other_sizes, other_sizes_every, source, scenes, unseen, seed,",
        ),
        ("data.unseen = 0", "[data] unseen is 0; it must be at least 1."),
        ("data.scenes = 1.5", "[data] scenes is 1.5; it must be a whole number."),
        ("controlnet_canny.data.unsaid = 2", "[controlnet_canny] data unsaid is 2; it must be from 0 to 1."),
        ("- data.seed", "[data] lacks seed, which miniature.dataset:Drawings needs for "),
        ("- data.unsaid", "drawings.zip is not a zip file of drawings; scripts/build-mini-data makes one."),
    ],
)
def test_a_wrong_option(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, sentence: str) -> None:
    (tmp_path / "drawings.zip").write_text("text")
    config = write_config(tmp_path, f"{DRAWN}\ndata.unsaid = 0.5\n{change}")
    assert train(config, "tokenizer", tmp_path / "drawings.zip", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
