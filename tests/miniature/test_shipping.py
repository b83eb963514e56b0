"""scripts/ship-mini: from what a training has finished to the shipped folder and its card, with tiny networks."""

import json
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.weights import DISTILLED, ModelFolder, save_component, write_model_json
from miniature import shipping
from miniature.fingerprint import fingerprint
from scripts import ship_mini
from scripts.stand_ins import shapes_of, write_lora
from tests.components import save_components
from tests.conftest import MINI
from tests.training.small import write_config
from training.distilled import ADAPTERS
from training.errors import TrainingError
from training.options import Options
from training.run import FINISHED, ORDER
from training.stages import STAGES, trained_by
from training.tasks.distil import FILE

EVERYTHING = ["tokenizer", *dict.fromkeys(name for stage in STAGES.values() for name in stage.trains)]
Ship = Callable[..., int]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def shipped(tmp_path: Path, components: dict[str, Any]) -> Path:
    """A shipped folder with everything: LoRAs, an adapter for few steps, a card."""
    folder = tmp_path / "weights" / "mini"
    save_components(folder, {name: one for name, one in components.items() if name != "controlnet_super_resolution"})
    for file in (folder / DISTILLED, folder / "loras" / "ink.safetensors"):
        file.parent.mkdir()
        write_lora(file, shapes_of(folder, ("prior", "decoder") if file.stem == "turbo" else ("prior",)), 2)
    opened = ModelFolder.open(folder)
    write_model_json(folder, name="Tiny", license="none", native_size=opened.native_size, sampler=opened.sampler)
    shutil.copy(MINI / "README.md", folder)
    return folder


@pytest.fixture
def trained(tmp_path: Path, components: dict[str, Any]) -> Path:
    """All components as a training leaves them, with other weights than those that are shipped; no stage is finished."""
    folder, generator = tmp_path / "kept", torch.Generator().manual_seed(5)
    for name in EVERYTHING:
        place = folder / "model" / name
        if name in ADAPTERS:
            place.mkdir(parents=True)
            network = name.removeprefix("turbo_")
            save_component(place.parent / "scratch" / network, components[network], torch.float32)
            shapes = {network: {key: tuple(one.shape) for key, one in components[network].state_dict().items()}}
            write_lora(place / FILE, shapes, 2)
            shutil.rmtree(place.parent / "scratch")
            continue
        save_component(place, components[name], torch.float32)
        for file in place.glob("*.safetensors"):
            tensors = load_file(file)
            for key, one in tensors.items():
                if one.is_floating_point() and one.ndim > 1:
                    tensors[key] = one + 0.01 * torch.randn(one.shape, generator=generator)
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def ship(config: Path, shipped: Path) -> Ship:
    def ship(*arguments: object) -> int:
        return ship_mini.main([*map(str, arguments), "--config", str(config), "--folder", str(shipped)])

    return ship


def finish(trained: Path, *stages: str) -> None:
    """Marks stages as finished, with their records."""
    for number, stage in enumerate(stages):
        (trained / stage).mkdir(exist_ok=True)
        (trained / stage / FINISHED).touch()
        session = {
            "started": f"2026-11-27T10:00:{number:02d}+00:00",
            "device": "cpu",
            "processes": 1,
            "first": 0,
            "last": 7,
        }
        options = asdict(Options(steps=7, batch_size=2, learning_rate=1e-3))
        record = {"stage": stage, "options": options, "sessions": [session]}
        if stage != "tokenizer":
            (trained / stage / "record.json").write_text(json.dumps(record))
    processes = [{"stage": stage, "started": "", "gpus": [], "seconds": 60.0} for stage in stages]
    calls = [{"started": "2026-11-27T10:00:00+00:00", "seconds": 60.0, "gpus": 1}]
    (trained / "recipe.json").write_text(json.dumps({"calls": calls, "processes": processes}))


def digests(folder: Path) -> dict[str, str]:
    return dict(ModelFolder.open(folder).checksums)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The components whose weights differ, are new or are gone."""
    weights = {path for path in before.keys() | after.keys() if path.endswith(".safetensors")}
    return {path.split("/")[0] for path in weights if before.get(path) != after.get(path)}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_everything_anew(ship: Ship, shipped: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(shipped)
    finish(trained, *ORDER)
    assert ship(trained) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "Left out, trained with other components: loras.\n" in said
    assert "Size all: " in said
    assert changed(before, digests(shipped)) == {*EVERYTHING, "turbo"} - {"tokenizer", *ADAPTERS}
    ModelFolder.open(shipped).verify()
    assert not (shipped / "loras").exists()
    assert {"vocabulary.json", "training.json", "README.md"} <= {file.name for file in shipped.iterdir()}
    assert "red apple" in json.loads((shipped / "vocabulary.json").read_text())["objects"]
    made = json.loads((shipped / "training.json").read_text())
    assert list(made["stages"]) == list(ORDER)
    card = (shipped / "README.md").read_text()
    assert "\n| stage_c | 7 | 2 | 1.0 | " in card
    assert f"\n| prior | {count(shipped, 'prior'):,} | " in card
    assert card.count("Not judged yet.") == 3  # from text, with the IP-Adapter, with few steps
    assert "37.6 MB" not in card


def count(folder: Path, name: str) -> int:
    return sum(one.numel() for one in ModelFolder.open(folder).load_component(name).parameters())


def test_what_the_recipe_leaves_out(
    ship: Ship, shipped: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Extras are left out if they are not trained anew: they were made for another Stage C."""
    finish(trained, *(stage for stage in ORDER if stage not in ("ip_adapter", "distil_c", "controlnet_inpainting")))
    assert ship(trained) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "Left out, trained with other components: controlnet_inpainting, ip_adapter, turbo, loras.\n" in said
    opened = ModelFolder.open(shipped)
    opened.verify()
    assert "controlnet_canny" in opened
    assert "ip_adapter" not in opened
    assert "controlnet_inpainting" not in opened
    assert opened.distilled() is None


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("ip_adapter",), ("distil_c", "distil_b"), ("previewer", "ip_adapter")])
def test_one_thing_more(ship: Ship, shipped: Path, trained: Path, stages: tuple[str, ...]) -> None:
    """All else stays, the times of earlier trainings, too."""
    (shipped / "training.json").write_text(
        json.dumps(
            {
                "seconds": 30.0,
                "process_seconds": 90.0,
                "calls": [{"started": "2026-11-26T10:00:00+00:00", "seconds": 30.0, "gpus": 4}],
                "stages": {"stage_c": {"process_seconds": 80.0}, "previewer": {"process_seconds": 10.0}},
            }
        )
    )
    before = digests(shipped)
    finish(trained, *stages)
    tables = tomllib.loads((trained.parent / "config.toml").read_text())
    if "previewer" in stages:  # which `semantic` makes
        others = [name for name in ORDER if name in tables and "previewer" in trained_by(name) and name not in stages]
        lines = "\n".join(f"- {name}" for name in others)
        write_config(trained.parent, lines)
    assert ship(trained) == 0
    names = {"distil_c": "turbo", "distil_b": "turbo"}
    assert changed(before, digests(shipped)) == {names.get(stage, stage) for stage in stages}
    assert (shipped / "loras" / "ink.safetensors").is_file()
    made = json.loads((shipped / "training.json").read_text())
    assert {"stage_c", *stages} <= set(made["stages"])
    assert made["process_seconds"] == sum(one["process_seconds"] for one in made["stages"].values())
    assert made["seconds"] == 90


def test_a_component_that_would_not_fit(
    ship: Ship, shipped: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(trained, "tokenizer", "stage_a", "clip", "vision", "semantic", "stage_b", "previewer")
    before = snapshot(shipped)
    assert ship(trained) == 1
    said = capsys.readouterr().err
    assert said.startswith("prior was trained with another effnet, image_encoder, text_encoder")
    assert said.count("\n") == 1
    assert snapshot(shipped) == before


def test_a_component_of_which_a_stage_is_not_finished(
    ship: Ship, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The semantic encoder's stage leaves a Stage B that is only begun."""
    finish(trained, *(stage for stage in ORDER if stage != "stage_b"))
    assert ship(trained) == 1
    assert capsys.readouterr().err.startswith("decoder was trained with another effnet, ")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda trained: None, "has no finished stage of the configuration."),
        (
            lambda trained: finish(trained, "ip_adapter") or shutil.rmtree(trained / "model"),
            "has no ip_adapter, although",
        ),
        (
            lambda trained: (
                finish(trained, "ip_adapter")
                or next((trained / "model" / "ip_adapter").glob("*.safetensors")).write_bytes(b"nothing")
            ),
            "cannot be read",
        ),
        (lambda trained: finish(trained, "ip_adapter") or (trained / "recipe.json").write_text("{"), "is damaged"),
    ],
)
def test_nothing_changes_after_an_error(
    ship: Ship,
    shipped: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    said: str,
) -> None:
    spoil(trained)
    before = snapshot(shipped)
    assert ship(trained) == 1
    assert said in capsys.readouterr().err
    assert snapshot(shipped) == before


def test_a_folder_that_would_be_too_large(
    ship: Ship, shipped: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shipping.LIMITS, "of LoRAs", 1000)
    before = snapshot(shipped)
    finish(trained, "ip_adapter")
    assert ship(trained) == 1
    assert "MB; it must be at most 0.001 MB." in capsys.readouterr().err
    assert snapshot(shipped) == before


@pytest.mark.slow
def test_infinite_weights_are_not_shipped(
    ship: Ship, shipped: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (trained / "model" / "vqgan").glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: one * torch.inf if one.is_floating_point() else one for name, one in tensors.items()}, file)
    finish(trained, *ORDER)
    before = snapshot(shipped)
    assert ship(trained) == 1
    assert "Stage A made pixels that are not finite, in float32: its weights are damaged" in capsys.readouterr().err
    assert snapshot(shipped) == before


@pytest.mark.slow
def test_loras_and_scores(ship: Ship, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each call writes what it is given, and leaves the rest of the card."""
    lora = tmp_path / "runs" / "pim" / "lora.safetensors"
    lora.parent.mkdir(parents=True)
    shutil.copy(shipped / "loras" / "ink.safetensors", lora)
    assert ship("--lora", lora) == 0
    assert sorted(file.name for file in (shipped / "loras").iterdir()) == ["ink.safetensors", "pim.safetensors"]
    card = (shipped / "README.md").read_text()
    assert "### With LoRAs\n\n`ink.safetensors` is a style" in card
    assert "(Apache-2.0).\n\nNot judged yet.\n<!-- end: loras -->" in card
    scores = tmp_path / "scores"
    scores.mkdir()
    (scores / "table.md").write_text(
        "3 sets.\n\n| score |\n\nVariation: scenes as image prompts, with an empty prompt."
    )
    (scores / "scores.json").write_text(json.dumps({"weights": fingerprint(shipped)}))
    (scores / "compare-1.json").write_text(json.dumps({"of": {"weights": fingerprint(shipped, "turbo")}}))
    (scores / "compare-1.md").write_text("turbo: 12 points.\n")
    (tmp_path / "loras-1.md").write_text("pim first: 90 %\n")
    assert ship("--scores", scores, "--lora-scores", tmp_path / "loras-1.md") == 0, capsys.readouterr().err
    assert ship("--turbo-scores", scores / "compare-1.json") == 0
    card = (shipped / "README.md").read_text()
    assert "<!-- begin: scores -->\n3 sets.\n\n| score |\n<!-- end: scores -->" in card
    assert "<!-- begin: images -->\n### With images\n\nVariation: scenes as image" in card
    assert "### With the speed turbo\n\nturbo: 12 points.\n" in card
    assert "(Apache-2.0).\n\npim first: 90 %\n<!-- end: loras -->" in card
    (scores / "scores.json").write_text(json.dumps({"weights": "others'"}))
    before = snapshot(shipped)
    assert ship("--scores", scores) == 1
    said = f"{scores / 'scores.json'} has the scores of other weights than those in {shipped}.\n"
    assert capsys.readouterr().err.endswith(said)
    assert snapshot(shipped) == before


def test_the_shipped_card_has_all_parts() -> None:
    """So that the next training can be shipped."""
    from miniature.card import filled

    card = (MINI / "README.md").read_text()
    for name in ("sizes", "training", "scores", "images", "ip-adapter", "turbo", "loras"):
        assert f"\nNEW {name}\n" in filled(card, {name: f"NEW {name}"})
    with pytest.raises(TrainingError, match="must have <!-- begin: other --> once"):
        filled(card, {"other": ""})
