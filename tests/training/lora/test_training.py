"""LoRAs of the tiny networks: what is written is what was trained, it is read back, and training goes on exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cascade import Cascade, Lora, Request
from cascade.networks.unet import StableCascadeUNet
from cascade.weights import ModelFolder
from cascade.weights.lora import Adapter, merged, place
from scripts import train_lora as command
from tests.training.small import write_pictures
from training.errors import TrainingError
from training.lora.adapters import adapted_layers, add_lora, linear_layers
from training.lora.file import FILE, key_of, metadata_of, tensors_of, write_lora
from training.lora.run import STATE, train_lora
from training.lora.settings import LoraSettings, Recipe, read_recipe

SMALL = {"rank": 2, "number": "float32", "resolution": 128, "caption_dropout": 0.3}
SHORT = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "ema": 0.5, "warmup": 0}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "pictures", 4)
    Image.new("RGB", (200, 100), "gray").save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide one")
    return folder


def recipe(lora: dict[str, Any] | None = None, options: dict[str, Any] | None = None) -> Recipe:
    return Recipe().changed({**SMALL, **(lora or {})}, {**SHORT, **(options or {})})


def prediction(network: StableCascadeUNet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    config = network.config
    made = {
        name: torch.randn(2, tokens, width, generator=generator)
        for name, tokens, width in (
            ("clip_text", 5, config.clip_text_in_channels),
            ("clip_text_pooled", 1, config.clip_text_pooled_in_channels),
            ("clip_img", 1, config.clip_image_in_channels),
        )
    }
    sample = torch.randn(2, 16, 6, 4, generator=generator)
    with torch.no_grad():
        return network(sample, torch.tensor([0.2, 0.9]), **made)


@pytest.mark.parametrize("targets", ["attention", "mlp", "conditions", "timesteps", "all"])
def test_merged_it_is_what_peft_computes(targets: str, model_folder: Path, tmp_path: Path) -> None:
    """For every layer, those too that are one in memory and several in files; and ours places all of it."""
    prior = ModelFolder.open(model_folder).load_component("prior")
    before, shapes = prediction(prior), {key: tuple(one.shape) for key, one in prior.state_dict().items()}
    layers = linear_layers(prior, (targets,))
    torch.manual_seed(3)
    trained = add_lora(prior, layers, rank=3, alpha=2.0)
    assert torch.equal(prediction(prior), before)
    assert {name.rpartition(".")[0] for name in trained} == set(layers)
    assert {name for name, one in prior.named_parameters() if one.requires_grad and "lora_" not in name} == set()
    for name, parameter in trained.items():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.05)
    expected = prediction(prior)
    assert (expected - before).abs().max() > 1e-3

    tensors = tensors_of({"prior": adapted_layers(prior)}, {}, torch.float32)
    about = metadata_of(tensors, title="t", resolution=128, rank=3, alpha=2.0, word="", model="Tiny")
    write_lora(tmp_path / FILE, tensors, about)
    adapter = Adapter.read(tmp_path / FILE)
    assert adapter.format == "kohya's format (since 25 February 2024; ComfyUI's names)" or targets != "attention"
    placed = place(adapter, {"prior": shapes})
    assert placed.ignored == ()
    fresh = ModelFolder.open(model_folder).load_component("prior")
    state = fresh.state_dict()
    for name, changes in placed.changes["prior"].items():
        state[name] = merged(state[name], [(change, 1.0) for change in changes])
    fresh.load_state_dict(state)
    torch.testing.assert_close(prediction(fresh), expected, atol=1e-5, rtol=0)


def test_names_are_those_that_comfyui_places() -> None:
    """comfy/lora.py: "lora_unet_" and the authors' name of a weight, with in_proj split into to_q, to_k and to_v."""
    assert key_of("prior", "down_blocks.0.2.attention.to_q") == "lora_unet_down_blocks_0_2_attention_attn_to_q"
    assert key_of("prior", "up_blocks.1.5.attention.to_out.0") == "lora_unet_up_blocks_1_5_attention_attn_out_proj"
    assert key_of("prior", "down_blocks.0.1.mapper_sca") == "lora_unet_down_blocks_0_1_mapper_sca"
    assert key_of("prior", "clip_txt_mapper") == "lora_unet_clip_txt_mapper"
    layer = "text_model.encoder.layers.3.self_attn.q_proj"
    assert key_of("text_encoder", layer) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"


@pytest.mark.slow
def test_everything_at_once(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    """A LoRA of Stage C and the text encoder, a new word, and a preserved prompt; the engine takes the file."""
    lora = {
        "targets": ["all"],
        "text_encoder_rank": 2,
        "word": "[abc]",
        "begins_from": "ab",
        "vectors": 2,
        "preserve": ["a b c", "c"],
        "preserve_pictures": 2,
        "samples": ["[abc] a", "b"],
        "dropout": 0.1,
    }
    output = tmp_path / "out"
    assert train_lora(model_folder, pictures, output, recipe(lora))
    assert [file.name for file in (output / STATE / "samples").iterdir()] == ["000004.png"]
    with safe_open(output / FILE, "pt") as file:
        about = file.metadata()
    assert about["modelspec.architecture"] == "stable-cascade-v1-prior/lora"
    assert about["modelspec.trigger_phrase"] == "[abc]"
    assert about["modelspec.title"] == "out"
    assert about["ss_network_dim"] == "2"
    tensors = load_file(output / FILE)
    assert tensors["bundle_emb.[abc].clip_g"].shape[0] == 2
    changed = [key for key, one in tensors.items() if key.endswith("lora_up.weight") and one.abs().max() > 0]
    assert len([key for key in changed if key.startswith("lora_te_text_model_encoder_layers_")]) == 12
    assert len(changed) > 20
    cascade = Cascade.load(model_folder, "cpu")
    plain, with_lora, without = (
        cascade.generate(Request("a [abc] b", width=64, height=64, loras=loras))[0]
        for loras in ((), [Lora(output / FILE)], ())
    )
    assert plain == without != with_lora
    said = json.loads((output / "settings.json").read_text())
    assert said["lora"]["begins_from"] == "ab"
    assert said["options"]["steps"] == 4


@pytest.mark.slow
def test_a_stopped_training_goes_on_exactly(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    lora = {"dropout": 0.2, "word": "abc", "begins_from": "a"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_lora(model_folder, pictures, whole, recipe(lora))
    assert not train_lora(model_folder, pictures, parts, recipe(lora), deadline=0)
    none = load_file(parts / FILE)
    assert not any(one.any() for key, one in none.items() if "lora_up" in key)
    for steps in (2, 4):
        # As if it had been killed after two steps: no schedule depends on their number.
        train_lora(model_folder, pictures, parts, recipe(lora, {"steps": steps}))
    one, other = load_file(whole / FILE), load_file(parts / FILE)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_trained_alone(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    train_lora(model_folder, pictures, tmp_path / "out", recipe(options={"steps": 1}))
    state = load_file(tmp_path / "out" / STATE / "state" / "model.safetensors")
    assert {key.rpartition("/")[2] for key in state} == {"up", "down"}
    other = recipe({"rank": 3}, {"steps": 2})
    with pytest.raises(TrainingError, match="does not fit this configuration"):
        train_lora(model_folder, pictures, tmp_path / "out", other)


@pytest.mark.slow
def test_the_command(model_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = shutil.make_archive(str(tmp_path / "zip"), "zip", pictures)
    toml = tmp_path / "recipe.toml"
    toml.write_text(
        '[lora]\nrank = 2\nresolution = 128\ntargets = ["mlp"]\n[options]\nsteps = 1\nlearning_rate = 1e-3\n'
    )
    arguments = [archive, "--weights", str(model_folder), "--output", str(tmp_path / "out"), "--recipe", str(toml)]
    assert command.main([*arguments, "--rank", "1", "--target", "attention", "--steps", "2"]) == 0
    tensors = load_file(tmp_path / "out" / FILE)
    assert {one.shape[0] for key, one in tensors.items() if "lora_down" in key} == {1}
    assert {one.dtype for one in tensors.values()} == {torch.float16}
    assert command.main([str(tmp_path / "nothing"), *arguments[1:]]) == 1
    assert command.main([*arguments, "--rank", "0"]) == 1
    errors = capsys.readouterr().err
    assert f"There is no folder or zip file {tmp_path / 'nothing'}.\n" in errors
    assert "[lora] rank is 0; it must be from 1 to 512.\n" in errors


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; it must be greater than 0"),
        ({"alpha": -1.0}, "alpha is -1.0; it must be greater than 0"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["conv"]}, "targets is ['conv']; it must be a list, each 'attention' or 'mlp'"),
        ({"resolution": 64}, "resolution is 64; it must be from 128 to 2048"),
        ({"begins_from": "dog"}, "begins_from is 'dog', but word, which begins from it, is empty"),
        ({"begins_from": "dog", "word": "a b"}, "word is 'a b'; a word that is learned has no white space"),
        ({"preserve": ["dog"], "preserve_share": 1.0}, "preserve_share is 1.0; it must lie between 0 and 1"),
        (
            {"preserve": ["a", "b"], "preserve_pictures": 1},
            "preserve has 2 prompts, but preserve_pictures is 1; each prompt",
        ),
        ({"samples": ["x"] * 17}, "samples has 17 prompts; 16 are the limit"),
        ({"size": 3}, "has an unknown name size"),
        ({"caption_dropout": 2}, "caption_dropout is 2; it must be from 0 to 1"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError) as caught:
        Recipe().changed(lora, {})
    assert sentence in str(caught.value)


def test_recipes(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[lora]\nsamples = ["a"]\n[options]\nsteps = 100\n')
    found = read_recipe(file)
    assert found.lora == LoraSettings(samples=("a",))
    assert (found.options.steps, found.options.warmup, found.options.learning_rate) == (100, 10, 1e-4)
    file.write_text("[lora]\nranks = 3\n")
    with pytest.raises(TrainingError, match="unknown name ranks"):
        read_recipe(file)
    with pytest.raises(TrainingError, match="There is no recipe"):
        read_recipe(tmp_path / "b.toml")


def test_in_bfloat16_the_gradient_is_nearly_that_of_float32(model_folder: Path) -> None:
    """As on a GPU: base weights in bfloat16, the LoRA in float32, under autocast, with recomputation."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        prior = ModelFolder.open(model_folder).load_component("prior", dtype=dtype).train()
        torch.manual_seed(3)
        trained = add_lora(prior, linear_layers(prior, ("all",)), rank=2, alpha=2.0)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in trained.items():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        if dtype == torch.bfloat16:
            prior.enable_gradient_checkpointing()
        made = {
            "clip_text": torch.randn(2, 5, prior.config.clip_text_in_channels, generator=generator),
            "clip_text_pooled": torch.randn(2, 1, prior.config.clip_text_pooled_in_channels, generator=generator),
        }
        sample = torch.randn(2, 16, 6, 4, generator=generator)
        torch.manual_seed(7)  # for dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            epsilon = prior(sample, torch.tensor([0.2, 0.9]), **made)
        epsilon.float().square().mean().backward()
        assert all(one.grad.dtype == one.dtype == torch.float32 for one in trained.values())
        gradients.append(torch.cat([one.grad.flatten() for one in trained.values()]))
    exact, rounded = gradients
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98
