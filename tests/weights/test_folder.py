"""Model folders: writing, loading, and errors that name the file."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModelWithProjection

from cascade.networks.controlnet import KINDS, PUBLISHED_BLOCKS, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.pipeline import Cascade
from cascade.weights import (
    COMPONENTS,
    NETWORKS,
    PROCESSORS,
    PUBLISHED_SAMPLER,
    ModelFolder,
    StageSettings,
    WeightsError,
    save_model_folder,
    write_model_json,
)
from cascade.weights.build import save_own
from cascade.weights.errors import readable

ABOUT = {
    "name": "Tiny",
    "license": "MIT",
    "native_size": 64,
    "sampler": {
        "prior": StageSettings(steps=3, guidance=2.0, shift=2.0, rescale=0.7),
        "decoder": StageSettings(steps=2, guidance=1.1, shift=1.0, rescale=0.7),
    },
}
PRIOR_FILE = "prior/diffusion_pytorch_model.safetensors"


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], tensor), key


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "copy")


def move_variant(source: Path, target: Path) -> None:
    """Copy a component in the published repositories' form: only the bf16 variant."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        file.rename(file.with_suffix("").with_suffix(".bf16.safetensors"))


@pytest.fixture(scope="module")
def published(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks laid out like the two published repositories; the lite prior's first weight is all ones."""
    root = tmp_path_factory.mktemp("published")
    prior, decoder = root / "stable-cascade-prior", root / "stable-cascade"
    for component in ("prior", "text_encoder", "image_encoder", "feature_extractor", "tokenizer"):
        move_variant(model_folder / component, prior / component)
    move_variant(model_folder / "prior", prior / "prior_lite")
    lite = prior / "prior_lite" / "diffusion_pytorch_model.bf16.safetensors"
    tensors = load_file(lite)
    tensors["embedding.1.weight"].fill_(1)
    save_file(tensors, lite)
    for component in ("vqgan", "text_encoder", "tokenizer"):
        move_variant(model_folder / component, decoder / component)
    move_variant(model_folder / "decoder", decoder / "decoder_lite")
    (decoder / "decoder").mkdir()
    shutil.copy(model_folder / "decoder" / "config.json", decoder / "decoder")
    torch.manual_seed(0)
    save_file(SemanticEncoder().half().state_dict(), decoder / "effnet_encoder.safetensors")
    save_file(Previewer().half().state_dict(), decoder / "previewer.safetensors")
    (decoder / "controlnet").mkdir()
    for kind, channels in KINDS.items():
        network = ControlNet(channels, out_channels=8, bottleneck_mode="simple")
        save_file(network.state_dict(), decoder / "controlnet" / f"{kind}.safetensors")
    return root


def test_distilled_weights_are_compared(copy: Path) -> None:
    assert ModelFolder.open(copy).distilled() is None
    file = copy / "turbo" / "turbo.safetensors"
    file.parent.mkdir()
    save_file({"prior.a.lora_A.weight": torch.ones(4)}, file)
    write_model_json(copy, **ABOUT)
    assert ModelFolder.open(copy).distilled() == file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"turbo\.safetensors is damaged: "):
        ModelFolder.open(copy).distilled()
    file.write_bytes(content[:-1])
    with pytest.raises(WeightsError, match=r"turbo\.safetensors is truncated or no safetensors file: "):
        ModelFolder.open(copy).distilled()


def test_a_sampler_is_stored_unless_it_is_the_usual_one(copy: Path) -> None:
    prior = StageSettings(steps=3, guidance=2.0, shift=2.0, rescale=0.7, sampler="ddim")
    write_model_json(copy, **{**ABOUT, "sampler": {**ABOUT["sampler"], "prior": prior}})
    stored = json.loads((copy / "model.json").read_text())["sampler"]
    assert (stored["prior"]["sampler"], "sampler" in stored["decoder"]) == ("ddim", False)
    assert ModelFolder.open(copy).sampler == {**ABOUT["sampler"], "prior": prior}


def test_everything_comes_back(model_folder: Path, components: dict[str, Any]) -> None:
    folder = ModelFolder.open(model_folder)
    assert (folder.name, folder.license, folder.native_size) == ("Tiny", "Apache-2.0", 128)
    assert folder.sampler["prior"] == StageSettings(steps=3, guidance=4.0, shift=2.0, rescale=0.7)
    folder.verify()
    for component in COMPONENTS:
        assert component in folder
        loaded = folder.load_component(component)
        assert type(loaded) is {**NETWORKS, **PROCESSORS}[component]
        if component in NETWORKS:
            assert not loaded.training
            assert_same_weights(loaded, components[component])
    tokens = [one(["An apple"])["input_ids"] for one in (folder.load_component("tokenizer"), components["tokenizer"])]
    assert tokens[0] == tokens[1]
    assert folder.load_component("feature_extractor") == components["feature_extractor"]


def test_loaded_networks_compute_the_same(model_folder: Path, components: dict[str, Any]) -> None:
    """The components' CLIP is transformers'."""
    folder = ModelFolder.open(model_folder)
    with torch.no_grad():
        ids = torch.tensor([[77, 3, 4, 78]])
        text = [
            encoder(ids).text_embeds for encoder in (folder.load_component("text_encoder"), components["text_encoder"])
        ]
        pixels = torch.rand(1, 3, 32, 32)
        image = [
            encoder(pixels).image_embeds
            for encoder in (folder.load_component("image_encoder"), components["image_encoder"])
        ]
    assert torch.equal(*text)
    assert torch.equal(*image)


def test_loading_leaves_torch_s_default_dtype(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads compute meanwhile. transformers would set the default to what the configuration says."""
    for component in ("text_encoder", "image_encoder"):
        config = copy / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    write_model_json(copy, **ABOUT)
    changed: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changed.append)
    for component in NETWORKS:
        ModelFolder.open(copy).load_component(component)
    assert changed == []


def test_dtype_is_the_caller_s(model_folder: Path) -> None:
    network = ModelFolder.open(model_folder).load_component("effnet", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.bfloat16, torch.int64}


def test_stored_in_bfloat16_but_for_buffers(tmp_path: Path, components: dict[str, Any]) -> None:
    save_model_folder(tmp_path / "m", {"effnet": components["effnet"]}, **ABOUT)
    stored = load_file(tmp_path / "m" / "effnet" / "diffusion_pytorch_model.safetensors")
    assert stored["mapper.0.weight"].dtype == torch.bfloat16
    assert stored["mapper.1.running_var"].dtype == torch.float32
    loaded = ModelFolder.open(tmp_path / "m").load_component("effnet")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32, torch.int64}


def test_saving_again_keeps_what_is_not_replaced(copy: Path, components: dict[str, Any]) -> None:
    (copy / "README.md").write_text("a card")
    before = load_file(copy / "vqgan" / "diffusion_pytorch_model.safetensors")
    (copy / "prior" / "left-over.txt").write_text("of an older version")
    save_model_folder(copy, {"prior": components["prior"]}, **ABOUT)
    assert (copy / "README.md").read_text() == "a card"
    assert not (copy / "prior" / "left-over.txt").exists()
    assert load_file(copy / PRIOR_FILE)["embedding.1.weight"].dtype == torch.bfloat16
    after = load_file(copy / "vqgan" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[key], before[key]) for key in before)
    folder = ModelFolder.open(copy)
    folder.verify()
    assert folder.license == "MIT"
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_saved_folder_does_not_tell_where_its_parts_came_from(copy: Path, tmp_path: Path) -> None:
    parts = {
        component: {**NETWORKS, **PROCESSORS}[component].from_pretrained(copy / component) for component in COMPONENTS
    }
    parts["text_encoder"] = CLIPTextModelWithProjection.from_pretrained(copy / "text_encoder")  # as training saves it
    assert parts["text_encoder"].name_or_path == str(copy / "text_encoder")
    save_model_folder(tmp_path / "saved", parts, **ABOUT)
    texts = {file: file.read_text() for file in (tmp_path / "saved").rglob("*.json")}
    assert len(texts) > len(COMPONENTS)
    for file, text in texts.items():
        assert str(tmp_path) not in text, file
        assert '"_name_or_path"' not in text, file
    assert ModelFolder.open(tmp_path / "saved").load_component("prior").config.conditioning_dim == 16


def test_a_failed_save_leaves_the_old_folder(copy: Path, components: dict[str, Any]) -> None:
    with pytest.raises(AttributeError):
        save_model_folder(copy, {"prior": components["prior"], "tokenizer": "no tokenizer"}, **ABOUT)
    ModelFolder.open(copy).verify()
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_unknown_component_is_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="'unet'"):
        save_model_folder(tmp_path / "m", {"unet": None}, **ABOUT)
    with pytest.raises(ValueError, match="'unet'"):
        ModelFolder.open(model_folder).load_component("unet")


def truncate(folder: Path) -> Path:
    file = folder / PRIOR_FILE
    file.write_bytes(file.read_bytes()[:-1])
    return file


def replace_by_pickle(folder: Path) -> Path:
    file = folder / PRIOR_FILE
    torch.save({"a": torch.zeros(1)}, file)
    return file


def remove_listed(folder: Path) -> Path:
    (folder / PRIOR_FILE).unlink()
    return folder / PRIOR_FILE


def list_a_pickle(folder: Path) -> Path:
    torch.save({}, folder / "prior" / "diffusion_pytorch_model.bin")
    write_model_json(folder, **ABOUT)
    return folder / "prior" / "diffusion_pytorch_model.bin"


def break_model_json(folder: Path) -> Path:
    (folder / "model.json").write_text("{")
    return folder / "model.json"


def edit_model_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((folder / "model.json").read_text())
    change(content)
    (folder / "model.json").write_text(json.dumps(content))
    return folder / "model.json"


def drop_a_field(folder: Path) -> Path:
    return edit_model_json(folder, lambda content: content["sampler"].pop("decoder"))


def list_a_file_outside(folder: Path) -> Path:
    return edit_model_json(folder, lambda content: content["files"].update({"../secret": "0"}))


@pytest.mark.parametrize(
    "damage",
    [truncate, replace_by_pickle, remove_listed, list_a_pickle, break_model_json, drop_a_field, list_a_file_outside],
)
def test_opening_names_the_damaged_file(copy: Path, damage: Callable[[Path], Path]) -> None:
    file = damage(copy)
    with pytest.raises(WeightsError) as caught:
        ModelFolder.open(copy)
    assert str(file) in str(caught.value)


def remove_config(folder: Path) -> Path:
    (folder / "prior" / "config.json").unlink()
    return folder / "prior" / "config.json"


def leave_only_a_pickle(folder: Path) -> Path:
    (folder / PRIOR_FILE).unlink()
    file = folder / "prior" / "diffusion_pytorch_model.bin"
    torch.save({}, file)
    return file


def leave_no_weights(folder: Path) -> Path:
    (folder / PRIOR_FILE).unlink()
    return folder / "prior"


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / PRIOR_FILE)
    change(tensors)
    save_file(tensors, folder / PRIOR_FILE)
    return folder / PRIOR_FILE


def drop_a_tensor(folder: Path) -> Path:
    return change_tensors(folder, lambda tensors: tensors.pop("embedding.1.weight"))


def add_a_tensor(folder: Path) -> Path:
    return change_tensors(folder, lambda tensors: tensors.update(surplus=torch.zeros(1)))


def reshape_a_tensor(folder: Path) -> Path:
    return change_tensors(folder, lambda tensors: tensors.update({"embedding.1.weight": torch.zeros(3)}))


@pytest.mark.parametrize(
    "damage",
    [remove_config, leave_only_a_pickle, leave_no_weights, drop_a_tensor, add_a_tensor, reshape_a_tensor],
)
def test_loading_names_the_damaged_file(copy: Path, damage: Callable[[Path], Path]) -> None:
    file = damage(copy)
    (copy / "model.json").unlink()
    write_model_json(copy, **ABOUT)
    if damage is leave_only_a_pickle:
        edit_model_json(copy, lambda content: content["files"].pop("prior/diffusion_pytorch_model.bin"))
    folder = ModelFolder.open(copy)
    with pytest.raises(WeightsError) as caught:
        folder.load_component("prior")
    assert str(file) in str(caught.value)


def write_shards(folder: Path, index: str, stem: str, outside: str | None = None) -> list[Path]:
    """Split a component's file into shards, as diffusers does with large files."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    files = [folder / f"{stem}-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    shards = [dict(list(tensors.items())[n::3]) for n in range(3)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file)
    weight_map = {key: outside or file.name for file, shard in zip(files, shards, strict=True) for key in shard}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return files


@pytest.mark.parametrize(
    ("index", "stem"),
    [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model"),
        ("diffusion_pytorch_model.safetensors.index.bf16.json", "diffusion_pytorch_model.bf16"),
        ("diffusion_pytorch_model.bf16.safetensors.index.json", "diffusion_pytorch_model.bf16"),
    ],
)
def test_shards(copy: Path, components: dict[str, Any], index: str, stem: str) -> None:
    files = write_shards(copy / "prior", index, stem)
    write_model_json(copy, **ABOUT)
    opened = ModelFolder.open(copy)
    assert_same_weights(opened.load_component("prior"), components["prior"])
    parameters = sum(one.numel() for one in components["prior"].parameters())
    assert opened.size("prior", torch.bfloat16) == 2 * parameters
    files[2].write_bytes(files[2].read_bytes()[:-4] + b"0000")
    with pytest.raises(WeightsError, match=rf"{files[2]} is damaged"):
        opened.load_component("prior")
    files[1].unlink()
    with pytest.raises(WeightsError, match=rf"{files[1]}, which {index} lists, is missing"):
        opened.load_component("prior")


@pytest.mark.parametrize("outside", ["../vqgan/diffusion_pytorch_model.safetensors", "shard.bin"])
def test_shards_that_are_not_opened(copy: Path, outside: str) -> None:
    write_shards(copy / "prior", "model.safetensors.index.json", "model", outside)
    (copy / "model.json").unlink()
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=r"outside of the folder|shard\.bin is a pickle"):
        ModelFolder.open(copy)


def test_a_file_of_another_name(copy: Path, components: dict[str, Any]) -> None:
    (copy / PRIOR_FILE).rename(copy / "prior" / "Mine.SAFETENSORS")
    write_model_json(copy, **ABOUT)
    assert_same_weights(ModelFolder.open(copy).load_component("prior"), components["prior"])
    shutil.copy(copy / "prior" / "Mine.SAFETENSORS", copy / "prior" / "yours.safetensors")
    with pytest.raises(WeightsError, match=r"several files of weights.*: Mine\.SAFETENSORS, yours\.safetensors"):
        ModelFolder.open(copy)


def to_launch_names(config: dict[str, Any]) -> dict[str, Any]:
    """A UNet's configuration in the names of diffusers 0.26, when Stable Cascade was launched."""
    blocks = {"SDCascadeResBlock": "C", "SDCascadeTimestepBlock": "T", "SDCascadeAttnBlock": "A"}
    return {
        "_class_name": "StableCascadeUnet",
        "c_in": config["in_channels"],
        "c_out": config["out_channels"],
        "c_r": config["timestep_ratio_embedding_dim"],
        "patch_size": config["patch_size"],
        "c_cond": config["conditioning_dim"],
        "c_hidden": config["block_out_channels"],
        "nhead": [heads or -1 for heads in config["num_attention_heads"]],
        "blocks": [config["down_num_layers_per_block"], config["up_num_layers_per_block"]],
        "block_repeat": [config["down_blocks_repeat_mappers"], config["up_blocks_repeat_mappers"]],
        "level_config": ["".join(blocks[one] for one in level) for level in config["block_types_per_layer"]],
        "c_clip_text": config["clip_text_in_channels"],
        "c_clip_text_pooled": config["clip_text_pooled_in_channels"],
        "c_clip_img": config["clip_image_in_channels"],
        "c_clip_seq": config["clip_seq"],
        "c_effnet": config["effnet_in_channels"],
        "c_pixels": config["pixel_mapper_in_channels"],
        "kernel_size": config["kernel_size"],
        "dropout": config["dropout"],
        "self_attn": config["self_attn"],
        "t_conds": config["timestep_conditioning_type"],
        "switch_level": config["switch_level"],
    }


@pytest.mark.parametrize("component", ["prior", "decoder"])
def test_configurations_with_the_launch_s_names(copy: Path, components: dict[str, Any], component: str) -> None:
    file = copy / component / "config.json"
    before = ModelFolder.open(copy).load_component(component)
    launch = to_launch_names(json.loads(file.read_text()))
    file.write_text(json.dumps(launch))
    write_model_json(copy, **ABOUT)
    loaded = ModelFolder.open(copy).load_component(component)
    assert_same_weights(loaded, components[component])
    ours = {key: value for key, value in before.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in ours} == ours
    file.write_text(json.dumps({**launch, "blocks": 3, "level_config": ["CXA"]}))
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=rf"{file} does not describe the {component}: "):
        ModelFolder.open(copy).load_component(component)


@pytest.mark.parametrize("component", ["prior", "decoder", "text_encoder", "vqgan"])
def test_the_first_shape_that_does_not_fit_is_named(copy: Path, component: str) -> None:
    """With another width in the configuration, no tensor fits."""
    file = copy / component / "config.json"
    config = json.loads(file.read_text())
    wider = {"block_out_channels": [2 * width for width in config.get("block_out_channels", [])]}
    wider |= {"hidden_size": 64, "intermediate_size": 128, "embed_dim": 32}
    file.write_text(json.dumps({**config, **{key: wider[key] for key in wider if key in config}}))
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError, match=r": \S+ has the shape \(.*\) instead of \(.*\), by .*config\.json"
    ) as caught:
        ModelFolder.open(copy).load_component(component)
    assert len(str(caught.value).replace(str(copy), "")) < 300


@pytest.mark.parametrize(
    ("component", "name", "value", "allowed"),
    [
        ("text_encoder", "num_attention_heads", 4.0, "a whole number"),
        ("text_encoder", "num_attention_heads", None, "a whole number"),
        ("text_encoder", "hidden_size", "x", "a whole number"),
        ("text_encoder", "eos_token_id", [1, 2], "a whole number"),
        ("text_encoder", "layer_norm_eps", "1e-5", "a number"),
        ("text_encoder", "pad_token_id", True, "a whole number or null"),
        ("image_encoder", "image_size", [64, 64], "a whole number"),
        ("vqgan", "scale_factor", "x", "a number"),
        ("prior", "clip_seq", "4", "a whole number"),
        ("controlnet_canny", "bottleneck_mode", 1, "a text"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(copy: Path, component: str, name: str, value: object, allowed: str) -> None:
    set_config(copy, component, {name: value})
    with pytest.raises(WeightsError) as caught:
        ModelFolder.open(copy).load_component(component)
    file = copy / component / "config.json"
    expected = f"{file} does not describe the {component}: {name} is {value!r}; it must be {allowed}."
    assert str(caught.value) == expected


@pytest.mark.parametrize("component", ["prior", "text_encoder", "vqgan"])
def test_names_that_a_network_does_not_know_change_nothing(
    copy: Path, components: dict[str, Any], component: str
) -> None:
    set_config(copy, component, {"self": 1, "foo": {"a": 1}, "torch_dtype": "float16"})
    assert_same_weights(ModelFolder.open(copy).load_component(component), components[component])


@pytest.mark.parametrize("component", ["text_encoder", "prior"])
def test_whole_numbers_in_place_of_others_are_named(copy: Path, component: str) -> None:
    (file,) = (copy / component).glob("*.safetensors")
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(file).items()}, file)
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=rf"^{file}: \S+ has whole numbers \(int32\), "):
        ModelFolder.open(copy).load_component(component)


def set_config(copy: Path, component: str, values: dict[str, Any]) -> None:
    file = copy / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    write_model_json(copy, **ABOUT)


def set_settings(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_tokenizer_and_a_text_encoder_that_do_not_fit(copy: Path) -> None:
    set_settings(copy / "tokenizer" / "tokenizer_config.json", {"model_max_length": 78})
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError, match=r"tokenizer has a model_max_length of 78, but .*text_encoder takes at most 77"
    ):
        Cascade.load(copy)
    new = {"80": {"content": "<new>"}}
    set_settings(copy / "tokenizer" / "tokenizer_config.json", {"model_max_length": 77, "added_tokens_decoder": new})
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError, match=r"tokenizer has the token '<new>' with the id 80, but .*text_encoder has 80"
    ):
        Cascade.load(copy)


@pytest.mark.parametrize("end", [0, 78, 10**12])
def test_a_tokenizer_and_a_text_encoder_with_other_ends_of_text(copy: Path, end: int) -> None:
    """The pooled vector would be the begin of text's, so all prompts would have the same one."""
    set_settings(copy / "text_encoder" / "config.json", {"eos_token_id": end})
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError,
        match=rf"tokenizer ends texts by the token 79, but .*text_encoder looks for {end}, its eos_token_id\.",
    ):
        Cascade.load(copy)


@pytest.mark.parametrize("scale", [0, -1, math.nan])
def test_a_stage_a_without_a_scale(copy: Path, scale: float) -> None:
    set_settings(copy / "vqgan" / "config.json", {"scale_factor": scale})
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=rf"vqgan: scale_factor is {scale}; it must be above 0\."):
        ModelFolder.open(copy).load_component("vqgan")


def test_what_the_system_does_not_read(copy: Path) -> None:
    with pytest.raises(WeightsError, match=r"^x+\.\.\. cannot be read: File name too long\.$"):
        ModelFolder.open("x" * 5000)
    (copy / "vqgan" / "config.json").unlink()
    (copy / "vqgan" / "config.json").mkdir()
    content = json.loads((copy / "model.json").read_text())
    del content["files"]["vqgan/config.json"]
    (copy / "model.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"vqgan/config.json cannot be read: Is a directory\.$"):
        ModelFolder.open(copy).load_component("vqgan")
    set_settings(copy / "model.json", {"files": {"x" * 5000: ""}})
    with pytest.raises(WeightsError, match=r"x\.\.\. cannot be read: File name too long\.$"):
        ModelFolder.open(copy)


def test_what_is_wrong_with_a_description_is_one_short_line(copy: Path) -> None:
    set_settings(copy / "model.json", {"sampler": {"prior": {"x" * 5000: 1}}})
    with pytest.raises(WeightsError, match=r"model\.json lacks a field or has one of the wrong kind: ") as error:
        ModelFolder.open(copy)
    assert len(str(error.value)) < 400


def test_what_other_libraries_say_of_files_is_one_short_line() -> None:
    with pytest.raises(WeightsError, match=r"^here cannot be read: no such thing") as error, readable("here"):
        raise OSError("no such\nthing " * 100)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_no_model_folder_is_made_with_a_tokenizer_that_does_not_fit(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy / "tokenizer", tmp_path / "own")
    set_settings(tmp_path / "own" / "tokenizer_config.json", {"model_max_length": 78})
    made = tmp_path / "made"
    with pytest.raises(WeightsError, match=r"made/tokenizer has a model_max_length of 78, but .*takes at most 77"):
        save_own({"tokenizer": tmp_path / "own"}, [], made, base=copy, download=tmp_path / "none")
    assert not made.exists()


def test_a_feature_extractor_and_an_image_encoder_that_do_not_fit(copy: Path) -> None:
    set_settings(copy / "feature_extractor" / "preprocessor_config.json", {"crop_size": {"height": 32, "width": 30}})
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError, match=r"feature_extractor makes images of 30x32 pixels, but .*image_encoder reads 32x32"
    ):
        Cascade.load(copy)


def test_old_position_ids_are_ignored(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None] + 1}, file)
    write_model_json(copy, **ABOUT)
    loaded = ModelFolder.open(copy).load_component("text_encoder").state_dict()
    embeddings = "text_model.embeddings.position_embedding.weight"
    (found,) = (value for name, value in loaded.items() if embeddings.endswith(name) or name.endswith(embeddings))
    assert torch.equal(found, tensors[embeddings].to(found.dtype))


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_broken_tokenizer_is_named(copy: Path, content: str | None) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=str(copy / "tokenizer")):
        ModelFolder.open(copy).load_component("tokenizer")


def test_tokenizer_of_vocabulary_and_merges(copy: Path, components: dict[str, Any]) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    (copy / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    file.unlink()
    write_model_json(copy, **ABOUT)
    loaded = ModelFolder.open(copy).load_component("tokenizer")
    assert loaded(["A red apple"])["input_ids"] == components["tokenizer"](["A red apple"])["input_ids"]
    assert loaded.model_max_length == 77


def test_a_tokenizer_that_ends_its_library(copy: Path) -> None:
    """The library's code in Rust panics, with an exception that is no `Exception`."""
    file = copy / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= {"continuing_subword_prefix": "##", "vocab": {**content["model"]["vocab"], "x": 0, "y": 1}}
    content["model"]["merges"] = [["x", "y"]]
    file.write_text(json.dumps(content))
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=r"tokenizer holds no readable tokenizer: slice index starts at 1"):
        ModelFolder.open(copy).load_component("tokenizer")


def test_feature_extractor_without_its_file(copy: Path) -> None:
    (copy / "feature_extractor" / "preprocessor_config.json").unlink()
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError, match=r"feature_extractor lacks preprocessor_config.json"):
        ModelFolder.open(copy).load_component("feature_extractor")


def test_verify_names_a_changed_file(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors["embedding.1.weight"].add_(1))
    folder = ModelFolder.open(copy)
    with pytest.raises(WeightsError, match=rf"{PRIOR_FILE} has the checksum [0-9a-f]{{64}}, but"):
        folder.verify()


def test_verify_names_a_file_that_is_not_listed(copy: Path) -> None:
    (copy / "prior" / "model.safetensors").write_bytes((copy / PRIOR_FILE).read_bytes())
    with pytest.raises(WeightsError, match=r"prior/model.safetensors is not listed"):
        ModelFolder.open(copy).verify()


def test_no_folder_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        ModelFolder.open(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"model.json does not exist, nor .*stable-cascade-prior"):
        ModelFolder.open(tmp_path)


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder", "prior", "decoder", "vqgan"])
def test_a_model_that_lacks_a_component(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    write_model_json(copy, **ABOUT)
    with pytest.raises(WeightsError) as caught:
        Cascade.load(copy)
    assert str(caught.value) == f"{copy} has no {component}."


@pytest.mark.parametrize(
    ("missing", "lacks"),
    [("stable-cascade", "decoder and no vqgan"), ("stable-cascade-prior", "prior")],
)
def test_one_repository_downloaded_of_two(published: Path, tmp_path: Path, missing: str, lacks: str) -> None:
    root = shutil.copytree(published, tmp_path / "published")
    shutil.rmtree(root / missing)
    with pytest.raises(WeightsError) as caught:
        Cascade.load(root)
    assert str(caught.value) == (
        f"{root} has no {lacks}: the published repository {missing} is not in it. scripts/download-weights fetches both."
    )


def test_missing_component(copy: Path) -> None:
    shutil.rmtree(copy / "previewer")
    write_model_json(copy, **ABOUT)
    folder = ModelFolder.open(copy)
    assert "previewer" not in folder
    with pytest.raises(WeightsError, match="has no previewer"):
        folder.load_component("previewer")


def test_the_scale_of_stage_a(tmp_path: Path, components: dict[str, Any]) -> None:
    """A model's own Stage A uses the scale of its configuration, unless model.json overrides it."""
    for scale in (None, 0.5):
        save_model_folder(tmp_path / "m", {"vqgan": components["vqgan"]}, stage_a_scale=scale, **ABOUT)
        assert ModelFolder.open(tmp_path / "m").stage_a_scale == scale
    content = json.loads((tmp_path / "m" / "model.json").read_text())
    assert content["stage_a_scale"] == 0.5
    (tmp_path / "m" / "model.json").write_text(json.dumps({**content, "stage_a_scale": "large"}))
    with pytest.raises(WeightsError, match=r"model.json: stage_a_scale is 'large'; it must be a number above 0"):
        ModelFolder.open(tmp_path / "m")


def test_published_repositories(published: Path, components: dict[str, Any]) -> None:
    folder = ModelFolder.open(published)
    assert folder.native_size == 1024
    assert folder.sampler == PUBLISHED_SAMPLER
    assert folder.stage_a_scale == 0.43
    for component in ("prior", "decoder", "vqgan", "text_encoder", "image_encoder"):
        assert_same_weights(folder.load_component(component), components[component])
    assert folder.load_component("tokenizer").model_max_length == 77
    assert folder.load_component("feature_extractor").crop == (32, 32)
    with pytest.raises(WeightsError, match=r"model.json does not exist"):
        folder.verify()


def test_published_lite(published: Path) -> None:
    """The decoder's full network was not downloaded, only its configuration, so both spellings give the lite one."""
    folder = ModelFolder.open(published, lite=("prior",))
    assert folder.load_component("prior").embedding[1].weight.unique().tolist() == [1]
    assert folder.parts["decoder"].name == "decoder_lite"
    assert ModelFolder.open(published, lite=("decoder",)).parts["prior"].name == "prior"
    with pytest.raises(ValueError, match="'vqgan'"):
        ModelFolder.open(published, lite=("vqgan",))


def test_published_single_files(published: Path) -> None:
    folder = ModelFolder.open(published)
    effnet, previewer = folder.load_component("effnet"), folder.load_component("previewer")
    assert effnet(torch.rand(1, 3, 64, 64)).shape == (1, 16, 2, 2)
    assert previewer(torch.rand(1, 16, 2, 2)).shape == (1, 3, 16, 16)
    assert effnet.dtype == torch.float32
    for kind, channels in KINDS.items():
        residuals = folder.load_component(f"controlnet_{kind}")(torch.rand(1, channels, 4, 4))
        assert {k: tuple(one.shape) for k, one in residuals.items()} == dict.fromkeys(PUBLISHED_BLOCKS, (1, 8, 4, 4))


def test_a_controlnet_in_the_place_of_another(copy: Path) -> None:
    for file in (copy / "controlnet_inpainting").iterdir():
        shutil.copy(file, copy / "controlnet_canny")
    write_model_json(copy, **ABOUT)
    with pytest.raises(
        WeightsError, match=r"controlnet_canny/.* is not a controlnet_canny: it reads 4 channels, not 1\."
    ):
        ModelFolder.open(copy).load_component("controlnet_canny")


def test_published_single_file_of_another_network(published: Path, tmp_path: Path) -> None:
    root = tmp_path / "published"
    (root / "stable-cascade").mkdir(parents=True)
    wrong = root / "stable-cascade" / "effnet_encoder.safetensors"
    shutil.copy(published / "stable-cascade" / "previewer.safetensors", wrong)
    with pytest.raises(WeightsError, match=str(wrong)):
        ModelFolder.open(root).load_component("effnet")


def test_published_in_the_hub_cache(published: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--stabilityai--stable-cascade-prior"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("7ca32c2")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "7ca32c2").symlink_to(published / "stable-cascade-prior")
    folder = ModelFolder.open(tmp_path)
    assert "prior" in folder
    assert "decoder" not in folder
    folder.load_component("text_encoder")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("sampler.prior.steps", "x", "in the sampler of prior, steps is 'x'; it must be a whole number, at least 1."),
        ("sampler.prior.steps", 0, "in the sampler of prior, steps is 0; it must be a whole number, at least 1."),
        ("sampler.decoder.steps", None, "in the sampler of decoder, steps is None; it must be a whole number"),
        (
            "sampler.decoder.guidance",
            None,
            "in the sampler of decoder, guidance is None; it must be a number at least 0.",
        ),
        (
            "sampler.prior.sampler",
            "euler",
            "in the sampler of prior, sampler is 'euler'; it must be one of ddpm, ddim,",
        ),
        ("sampler.prior.sampler", [], "in the sampler of prior, sampler is []; it must be one of ddpm, ddim,"),
        ("sampler.prior.shift", -1, "in the sampler of prior, shift is -1; it must be a number above 0."),
        ("sampler.prior.rescale", [], "in the sampler of prior, rescale is []; it must be a number from 0 to 1."),
        ("sampler.prior.rescale", True, "in the sampler of prior, rescale is True; it must be a number from 0 to 1."),
        ("native_size", 0, "native_size is 0; it must be a whole number from 64 to 2048."),
        ("native_size", "128", "native_size is '128'; it must be a whole number from 64 to 2048."),
        ("stage_a_scale", 0, "stage_a_scale is 0; it must be a number above 0."),
        ("stage_a_scale", -0.43, "stage_a_scale is -0.43; it must be a number above 0."),
        ("stage_a_scale", math.nan, "stage_a_scale is nan; it must be a number above 0."),
        ("stage_a_scale", math.inf, "stage_a_scale is inf; it must be a number above 0."),
        ("stage_a_scale", True, "stage_a_scale is True; it must be a number above 0."),
        ("stage_a_scale", "0.43", "stage_a_scale is '0.43'; it must be a number above 0."),
        ("license", -1, "license is -1; it must be a text."),
        ("name", ["x"], "name is ['x']; it must be a text."),
    ],
)
def test_settings_that_no_picture_could_be_made_with(
    model_folder: Path, tmp_path: Path, name: str, value: object, sentence: str
) -> None:
    """They are refused when the folder is opened, not by the first request."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    content = json.loads((folder / "model.json").read_text())
    *path, last = name.split(".")
    table = content
    for key in path:
        table = table[key]
    table[last] = value
    (folder / "model.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError) as raised:
        ModelFolder.open(folder)
    assert str(raised.value).startswith(f"{folder / 'model.json'}: {sentence}")
