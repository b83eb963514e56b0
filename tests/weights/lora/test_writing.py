"""scripts/convert-lora: one file of any format, which changes a model as the source does."""

import json
import logging
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from cascade.weights.lora import Adapter, Placed, merged, place
from cascade.weights.lora.writing import write
from scripts.convert_lora import main
from tests.readme import ROOT, block, commands
from tests.weights.lora.networks import FOLDER, description, shapes, text_encoder, unet
from tests.weights.lora.test_fixtures import NAMES, file_of, place_authors, vocabulary


def placed_and_networks(name: str, folder: Path) -> tuple[Placed, dict[str, torch.nn.Module]]:
    if name.startswith("authors_"):
        return place_authors(name, folder), {"prior": unet(name), "text_encoder": text_encoder(name)}
    networks = {"prior": unet("stage_c"), "text_encoder": text_encoder()}
    if "c_effnet" in description(name).get("config", {}):
        networks["decoder"] = unet(name)
    known = {component: shapes(network) for component, network in networks.items()}
    return place(Adapter.read(file_of(name)), known), networks


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_changes_the_same(name: str, tmp_path: Path) -> None:
    placed, networks = placed_and_networks(name, tmp_path)
    known = {component: shapes(network) for component, network in networks.items()}
    path = tmp_path / "new" / "one.safetensors"
    path.parent.mkdir()
    write(placed, known, path)
    again = place(Adapter.read(path), known, vocabulary() if placed.adapter.rows is not None else None)
    assert [word.name for word in again.words] == [
        "embedding.adapter" if name == "embedding" else word.name for word in placed.words
    ]
    for one, other in zip(again.words, placed.words, strict=True):
        assert torch.equal(one.vectors, other.vectors)
        assert one.begins_from == other.begins_from
    assert again.changes.keys() == placed.changes.keys()
    for component, changes in placed.changes.items():
        state = networks[component].state_dict()
        assert again.changes[component].keys() == changes.keys()
        for key, several in changes.items():
            expected = merged(state[key], [(change, 1.0) for change in several])
            made = merged(state[key], [(change, 1.0) for change in again.changes[component][key]])
            torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)


def test_what_was_written_has_comfyuis_names(tmp_path: Path) -> None:
    placed, networks = placed_and_networks("onetrainer_legacy", tmp_path)
    path = tmp_path / "one.safetensors"
    write(placed, {component: shapes(network) for component, network in networks.items()}, path)
    assert Adapter.read(path).format == "kohya's format (since 25 February 2024; ComfyUI's names)"
    keys = load_file(path)
    assert "lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight" in keys
    assert "lora_unet_down_blocks_0_2_attention_attn_out_proj.alpha" in keys
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in keys
    assert "lora_prior_te_text_projection.lora_up.weight" in keys
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "stable_cascade"


def example(folder: Path) -> Path:
    """The published example's kind of file: attention of the full Stage C, and a word."""
    from safetensors.torch import save_file

    tensors = {"embeddings.embeddings": torch.ones(1, 1280), "embeddings.indices": torch.tensor([49408])}
    for i in range(128):
        tensors[f"weights.{i}.lora_down"] = torch.zeros(1, 2048)
        tensors[f"weights.{i}.lora_up"] = torch.zeros(3 * 2048 if i % 2 else 2048, 1)
    save_file(tensors, folder / "fernando.safetensors")
    told = {"module_filters": [".attn"], "train_tokens": [["[fernando]", "^dog</w>"]]}
    (folder / "settings.json").write_text(json.dumps(told))
    return folder / "fernando.safetensors"


@pytest.mark.slow
def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    source, target = example(tmp_path), tmp_path / "new.safetensors"
    with caplog.at_level(logging.INFO):
        assert main([str(source), str(target), "--settings", str(tmp_path / "settings.json")]) == 0
    assert "256 layers of Stage C (prior), words [fernando]" in caplog.text
    assert len(load_file(target)) == 3 * 256 + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fernando.safetensors",
        "new.safetensors",
        "settings.json",
    ]
    assert main([str(tmp_path / "none"), str(target)]) == 1
    assert "There is no file or folder" in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "no" / "one.safetensors")]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    assert main([str(source), str(target), "--settings", str(tmp_path / "none.json")]) == 1
    assert "There is no file" in capsys.readouterr().err


def test_script_for_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(file_of("kohya"), tmp_path / "one.safetensors")
    mini = str(ROOT / "weights" / "mini")
    assert main([str(tmp_path / "one.safetensors"), str(tmp_path / "new.safetensors"), "--model", mini]) == 1
    assert "is for a Stage C of the width 32; this model's has" in capsys.readouterr().err
    assert not (tmp_path / "new.safetensors").exists()
    assert FOLDER.is_dir()


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    known = {"prior": shapes(unet("stage_c")), "text_encoder": shapes(text_encoder())}
    write(place(Adapter.read(FOLDER / "kohya.adapter.safetensors"), known), known, tmp_path / "one.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "one.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files of the kinds that they name: a folder that PEFT wrote, and the authors' file and settings."""
    monkeypatch.chdir(tmp_path)
    network = torch.nn.ModuleDict({"clip_txt_mapper": torch.nn.Linear(1280, 2048)})
    get_peft_model(network, LoraConfig(r=1, target_modules=["clip_txt_mapper"])).save_pretrained("step1000")
    example(tmp_path).rename("lora_fernando_10k.safetensors")
    page = ROOT / "docs" / "lora.md"
    Path("fernando.json").write_text(block(page, "json", "[fernando]"))
    given = [shlex.split(line)[1:] for line in commands(page) if line.startswith("scripts/convert-lora ")]
    assert [main(arguments) for arguments in given] == [0, 0]
    assert len(load_file("style.safetensors")) == 3
    assert len(load_file("fernando.safetensors")) == 3 * 256 + 2
