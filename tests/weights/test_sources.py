"""``scripts/save-weights`` with the user's own files and folders: each becomes a model folder, or one error sentence."""

import json
import shutil
import struct
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.networks.effnet import IMAGENET_MEAN, IMAGENET_STD, SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights import DISTILLED, ModelFolder, reading, write_model_json
from cascade.weights.making import make
from cascade.weights.variants import VARIANTS
from scripts.save_weights import main

StateDict = dict[str, Tensor]
Save = Callable[..., ModelFolder]
Refuse = Callable[..., str]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "mine"


@pytest.fixture
def save(model_folder: Path, tmp_path: Path, output: Path) -> Save:
    """Run the script, which must succeed. The tiny model provides the other components."""

    def save(*arguments: str | Path, base: Path = model_folder) -> ModelFolder:
        more = ["--base", base, "--output", output, "--download", tmp_path / "no download"]
        assert main([str(argument) for argument in (*arguments, *more)]) == 0
        opened = ModelFolder.open(output)
        opened.verify()
        return opened

    return save


@pytest.fixture
def refuse(model_folder: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run the script, which must fail with one sentence and write nothing. Returns the sentence."""

    def refuse(*arguments: str | Path, base: Path = model_folder) -> str:
        more = ["--base", base, "--output", output, "--download", tmp_path / "no download"]
        capsys.readouterr()
        assert main([str(argument) for argument in (*arguments, *more)]) == 1
        (sentence,) = capsys.readouterr().err.splitlines()
        assert not output.exists()
        assert sentence.endswith(".")
        assert len(sentence.replace(f"{tmp_path}/", "")) < 400
        return sentence.replace(f"{tmp_path}/", "")

    return refuse


def theirs(state_dict: StateDict, stage_b: bool = False) -> StateDict:
    """A state dict under the authors' names."""
    result: StateDict = {}
    for key, tensor in state_dict.items():
        if ".attention.to_" in key and "to_out" not in key:
            stem, _, rest = key.rpartition("to_")
            kind = rest.partition(".")[2]
            if rest.startswith("q"):
                parts = [state_dict[f"{stem}to_{name}.{kind}"] for name in "qkv"]
                result[f"{stem}attn.in_proj_{kind}"] = torch.cat(parts)
            continue
        key = key.replace(".attention.to_out.0.", ".attention.attn.out_proj.")
        key = key.replace("vquantizer.embedding.", "vquantizer.codebook.")
        result[key.replace("clip_txt_pooled_mapper.", "clip_mapper.") if stage_b else key] = tensor
    return result


def prefixed(prefix: str, state_dict: StateDict) -> StateDict:
    return {f"{prefix}{key}": tensor for key, tensor in state_dict.items()}


def comfy_text_encoder(state_dict: StateDict) -> StateDict:
    result = prefixed("text_encoder.clip_g.transformer.", state_dict)
    projection = result.pop("text_encoder.clip_g.transformer.text_projection.weight")
    result["text_encoder.clip_g.text_projection"] = projection.T.contiguous()
    result["text_encoder.clip_g.logit_scale"] = torch.tensor(4.6)
    return result


def comfy_stage_c(components: dict[str, nn.Module]) -> StateDict:
    """ComfyUI's checkpoint of Stage C: all networks in one file."""
    parts = {name: components[name].state_dict() for name in ("prior", "effnet", "previewer", "image_encoder")}
    return {
        **prefixed("model.diffusion_model.", theirs(parts["prior"])),
        **prefixed("vae.encoder.", parts["effnet"]),
        "vae.encoder.mean": torch.tensor(IMAGENET_MEAN),
        "vae.encoder.std": torch.tensor(IMAGENET_STD),
        **prefixed("vae.previewer.", parts["previewer"]),
        **prefixed("clip_l_vision.", parts["image_encoder"]),
        **comfy_text_encoder(components["text_encoder"].state_dict()),
    }


def comfy_stage_b(components: dict[str, nn.Module]) -> StateDict:
    parts = {name: components[name].state_dict() for name in ("decoder", "vqgan")}
    return {
        **prefixed("model.diffusion_model.", theirs(parts["decoder"], stage_b=True)),
        **prefixed("vae.", theirs(parts["vqgan"])),
        **comfy_text_encoder(components["text_encoder"].state_dict()),
    }


def changed(network: nn.Module) -> StateDict:
    """Weights with other values, like a fine-tuned network's. All formats store these values exactly."""
    return {
        key: torch.full_like(tensor, 0.5) + (torch.arange(tensor.numel()) % 3).view(tensor.shape) / 4
        if tensor.is_floating_point()
        else tensor
        for key, tensor in network.state_dict().items()
    }


def assert_holds(opened: ModelFolder, component: str, expected: StateDict) -> None:
    """Compare in float32. Large networks were stored in bfloat16."""
    loaded = opened.load_component(component).state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor.bfloat16().to(loaded[key].dtype) if tensor.ndim else tensor), key


def same(state_dict: StateDict) -> StateDict:
    return state_dict


NAMES: dict[str, Callable[[StateDict], StateDict]] = {
    "the authors'": theirs,
    "diffusers'": same,
    "ComfyUI's": lambda weights: prefixed("model.diffusion_model.", theirs(weights)),
    "ComfyUI's of today": lambda weights: prefixed("diffusion_model.", weights),
    "a compiled module's": lambda weights: prefixed("module._orig_mod.", weights),
    "a trainer's": lambda weights: prefixed("generator.", theirs(weights)),
}


@pytest.mark.parametrize(
    ("names", "file"),
    [*((names, "my.safetensors") for names in NAMES), ("the authors'", "MY.SAFETENSORS"), ("diffusers'", "c6af1b8e")],
)
def test_a_fine_tuned_stage_c(
    save: Save, tmp_path: Path, components: dict[str, Any], model_folder: Path, names: str, file: str
) -> None:
    weights = changed(components["prior"])
    save_file(NAMES[names](weights), tmp_path / file)
    opened = save("--prior", tmp_path / file)
    assert_holds(opened, "prior", weights)
    assert opened.name == tmp_path.joinpath(file).stem
    assert set(opened.parts) == set(ModelFolder.open(model_folder).parts)
    vqgan = opened.parts["vqgan"] / "diffusion_pytorch_model.safetensors"
    assert vqgan.samefile(model_folder / "vqgan" / vqgan.name)
    (prior,) = opened.parts["prior"].glob("*.safetensors")
    assert not prior.samefile(tmp_path / file)


def eight_bits(dtype: torch.dtype, style: str | None) -> Callable[[StateDict], StateDict]:
    """Store matrices in 8 bits: without scales, or with ComfyUI's, one in all or one per row."""

    def change(state_dict: StateDict) -> StateDict:
        result: StateDict = {}
        for key, tensor in state_dict.items():
            if tensor.ndim != 2 or not key.endswith(".weight"):
                result[key] = tensor.half() if tensor.is_floating_point() else tensor
                continue
            scale = torch.tensor(2.0)
            if style == "weight_scale":
                scale = 2.0 ** (torch.arange(len(tensor)) % 3)[:, None]
            result[key] = (tensor / scale if style else tensor).to(dtype)
            stem = key.removesuffix(".weight")
            if style == "scale_weight":
                result |= {f"{stem}.scale_weight": scale, f"{stem}.scale_input": torch.tensor(3.0)}
            elif style == "weight_scale":
                mark = json.dumps({"format": "float8_e4m3fn"}).encode()
                result |= {f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": torch.tensor(list(mark)).byte()}
        if style == "scale_weight":
            result["scaled_fp8"] = torch.tensor([], dtype=dtype)
        return result

    return change


PRECISIONS: dict[str, tuple[Callable[[StateDict], StateDict], torch.dtype]] = {
    "fp32": (same, torch.bfloat16),
    "bf16": (lambda weights: {key: one.bfloat16() for key, one in weights.items()}, torch.bfloat16),
    "fp16": (lambda weights: {key: one.half() for key, one in weights.items()}, torch.float16),
    "fp8 e4m3": (eight_bits(torch.float8_e4m3fn, None), torch.bfloat16),
    "fp8 e5m2": (eight_bits(torch.float8_e5m2, None), torch.bfloat16),
    "fp8 with a scale": (eight_bits(torch.float8_e4m3fn, "scale_weight"), torch.bfloat16),
    "fp8 with a scale a row": (eight_bits(torch.float8_e4m3fn, "weight_scale"), torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(save: Save, tmp_path: Path, components: dict[str, Any], precision: str) -> None:
    change, stored = PRECISIONS[precision]
    weights = changed(components["prior"])
    save_file(prefixed("model.diffusion_model.", change(theirs(weights))), tmp_path / "my.safetensors")
    opened = save("--stage-c", tmp_path / "my.safetensors")
    assert_holds(opened, "prior", weights)
    (file,) = opened.parts["prior"].glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {stored}


def test_small_networks_keep_float32(save: Save, tmp_path: Path, components: dict[str, Any]) -> None:
    weights = changed(components["vqgan"])
    save_file(theirs(weights), tmp_path / "stage_a.safetensors")
    opened = save("--stage-a", tmp_path / "stage_a.safetensors")
    assert_holds(opened, "vqgan", weights)
    (file,) = opened.parts["vqgan"].glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32, torch.int64}
    assert opened.name == "Tiny"  # only Stages C and B change the model's name


def test_a_fine_tuned_stage_a_keeps_the_scale(
    save: Save, tmp_path: Path, model_folder: Path, components: dict[str, Any]
) -> None:
    """Its scale is the original network's, unless its own configuration has another."""
    about = ModelFolder.open(model_folder)
    base = shutil.copytree(model_folder, tmp_path / "base")
    more = {"license": about.license, "native_size": about.native_size, "sampler": about.sampler}
    write_model_json(base, name="Scaled", stage_a_scale=0.7, **more)
    save_file(theirs(changed(components["vqgan"])), tmp_path / "a.safetensors")
    assert save("--vqgan", tmp_path / "a.safetensors", base=base).stage_a_scale == 0.7
    components["vqgan"].save_pretrained(tmp_path / "own")
    opened = save("--vqgan", tmp_path / "own", base=base)
    assert opened.stage_a_scale is None
    torch.manual_seed(0)
    published = StageA(bottleneck_blocks=1)
    published.save_pretrained(tmp_path / "tuned")
    assert save("--vqgan", tmp_path / "tuned", base=base).stage_a_scale == 0.43


@pytest.fixture
def distilled_base(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with an adapter for few steps."""
    base = shutil.copytree(model_folder, tmp_path / "base")
    (base / DISTILLED).parent.mkdir()
    save_file({"prior.x.lora_A.weight": torch.zeros(1, 1)}, base / DISTILLED)
    about = ModelFolder.open(base)
    more = {"license": about.license, "native_size": about.native_size, "sampler": about.sampler}
    write_model_json(base, name=about.name, **more)
    return base


def test_an_adapter_for_few_steps_stays_with_the_weights_that_it_was_made_for(
    save: Save, tmp_path: Path, distilled_base: Path, components: dict[str, Any]
) -> None:
    save_file(theirs(changed(components["vqgan"])), tmp_path / "a.safetensors")
    assert save("--vqgan", tmp_path / "a.safetensors", base=distilled_base).distilled() is not None


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_an_adapter_for_few_steps_is_left_out_with_other_weights(
    save: Save,
    tmp_path: Path,
    distilled_base: Path,
    output: Path,
    components: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    """Whether it would come from the base or is in the folder already."""
    caplog.set_level("INFO")
    save_file(theirs(changed(components[stage]), stage == "decoder"), tmp_path / "own.safetensors")
    assert save(f"--{stage}", tmp_path / "own.safetensors", base=distilled_base).distilled() is None
    assert f"Leaving out the adapter for the speed turbo, which was made for another {stage}" in caplog.text
    components["vqgan"].save_pretrained(tmp_path / "vqgan")
    assert save("--vqgan", tmp_path / "vqgan", base=distilled_base).distilled() is None
    shutil.rmtree(output)
    shutil.copytree(distilled_base, output)
    assert save("--vqgan", tmp_path / "vqgan").distilled() is not None
    assert save(f"--{stage}", tmp_path / "own.safetensors").distilled() is None


@pytest.mark.slow
def test_comfyui_s_stage_c_in_one_file(save: Save, tmp_path: Path, components: dict[str, Any]) -> None:
    weights = {name: changed(components[name]) for name in ("prior", "text_encoder")}
    tuned = {
        **prefixed("model.diffusion_model.", theirs(weights["prior"])),
        **comfy_text_encoder(weights["text_encoder"]),
    }
    save_file({**comfy_stage_c(components), **tuned}, tmp_path / "all.safetensors")
    opened = save("--prior", tmp_path / "all.safetensors")
    assert_holds(opened, "prior", weights["prior"])
    assert_holds(opened, "text_encoder", weights["text_encoder"])
    for name in ("effnet", "previewer", "image_encoder"):  # the model's have better precision
        for key, tensor in components[name].state_dict().items():
            assert torch.equal(opened.load_component(name).state_dict()[key], tensor)
    (image,) = Cascade.load(opened.root).generate(
        Request("A square", width=64, height=64, steps_prior=1, steps_decoder=1)
    )
    assert image.size == (64, 64)


@pytest.mark.slow
def test_encoders_that_the_model_lacks_are_taken_too(
    save: Save, tmp_path: Path, model_folder: Path, components: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    encoders = {"effnet": SemanticEncoder(), "previewer": Previewer()}  # published width
    save_file(comfy_stage_c({**components, **encoders}), tmp_path / "all.safetensors")
    base = shutil.copytree(model_folder, tmp_path / "base")
    about = ModelFolder.open(base)
    for name in encoders:
        shutil.rmtree(base / name)
    write_model_json(base, name=about.name, license=about.license, native_size=about.native_size, sampler=about.sampler)
    opened = save("--prior", tmp_path / "all.safetensors", base=base)
    for name, network in encoders.items():
        loaded = opened.load_component(name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in network.state_dict().items())


def test_comfyui_s_stage_b_in_one_file(save: Save, tmp_path: Path, components: dict[str, Any]) -> None:
    save_file(comfy_stage_b(components), tmp_path / "b.safetensors")
    opened = save("--stage-b", tmp_path / "b.safetensors", "--name", "Bee")
    assert opened.name == "Bee"
    for name in ("decoder", "vqgan", "text_encoder"):
        assert opened.load_component(name).state_dict().keys() == components[name].state_dict().keys()
    assert_holds(opened, "decoder", components["decoder"].state_dict())


def test_controlnets_are_told_apart(save: Save, tmp_path: Path, components: dict[str, Any], model_folder: Path) -> None:
    names = ("controlnet_inpainting", "controlnet_canny")
    arguments: list[str | Path] = []
    for name in names:
        weights = changed(components[name])
        file = tmp_path / name / "mine.safetensors"
        file.parent.mkdir()
        save_file(weights, file)
        arguments += ["--controlnet", file]
    opened = save(*arguments)
    for name in names:
        loaded = opened.load_component(name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in changed(components[name]).items())


def write_shards(folder: Path, weights: StateDict, index: bool) -> Path:
    folder.mkdir()
    names = [f"my-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file(dict(list(weights.items())[number::2]), folder / name)
    if index:
        weight_map = {key: names[number % 2] for number, key in enumerate(weights)}
        (folder / "my.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("given", "index"),
    [
        ("my.safetensors.index.json", True),
        ("my-00002-of-00002.safetensors", True),
        ("my-00002-of-00002.safetensors", False),
    ],
)
def test_shards(save: Save, tmp_path: Path, components: dict[str, Any], given: str, index: bool) -> None:
    weights = changed(components["prior"])
    folder = write_shards(tmp_path / "shards", prefixed("model.", theirs(weights)), index)
    assert_holds(save("--prior", folder / given), "prior", weights)


def rename(folder: Path, names: dict[str, str]) -> Path:
    for old, new in names.items():
        (folder / old).rename(folder / new)
    return folder


@pytest.mark.parametrize("given", ["", "config.json", "diffusion_pytorch_model.safetensors"])
def test_a_component_s_folder(save: Save, tmp_path: Path, components: dict[str, Any], given: str) -> None:
    """Its own configuration may differ from the model's networks."""
    torch.manual_seed(0)
    config = {**components["prior"].config, "down_num_layers_per_block": (2, 1)}
    network = type(components["prior"]).from_config(config)
    network.save_pretrained(tmp_path / "mine")
    opened = save("--prior", tmp_path / "mine" / given)
    assert_holds(opened, "prior", network.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        {},
        {"prior": "prior_lite"},
        {
            "prior": "prior_prior",
            "image_encoder": "prior_image_encoder",
            "feature_extractor": "prior_feature_extractor",
        },
    ],
)
def test_a_pipeline_s_folder(save: Save, tmp_path: Path, model_folder: Path, names: dict[str, str]) -> None:
    pipeline = shutil.copytree(model_folder, tmp_path / "pipeline")
    (pipeline / "model.json").unlink()
    (pipeline / "model_index.json").write_text("{}")
    rename(pipeline, names)
    empty = tmp_path / "empty"
    for given in (pipeline, pipeline / "model_index.json"):
        opened = save("--prior", given, base=empty)
        assert set(opened.parts) == set(ModelFolder.open(model_folder).parts)
        shutil.rmtree(opened.root)


def test_a_folder_of_the_hub_s_cache(save: Save, tmp_path: Path, model_folder: Path) -> None:
    cache = tmp_path / "models--me--mine"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    shutil.copytree(model_folder, cache / "snapshots" / "abc")
    assert "prior" in save("--prior", cache)


def test_the_model_that_is_there_is_changed(
    save: Save, tmp_path: Path, components: dict[str, Any], output: Path
) -> None:
    save_file(changed(components["prior"]), tmp_path / "first.safetensors")
    save("--prior", tmp_path / "first.safetensors")
    (output / "README.md").write_text("mine")
    save_file(changed(components["decoder"]), tmp_path / "second.safetensors")
    opened = save("--decoder", tmp_path / "second.safetensors", base=tmp_path / "nowhere")
    assert opened.name == "second"
    assert_holds(opened, "prior", changed(components["prior"]))
    assert (output / "README.md").read_text() == "mine"


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "Stable Diffusion 1.5": {
        "model.diffusion_model.input_blocks.0.0.weight": (2,),
        "model.diffusion_model.time_embed.0.weight": (2,),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (2, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (2,),
        "first_stage_model.encoder.down.0.block.0.norm1.weight": (2,),
        "first_stage_model.decoder.up.0.block.0.norm1.weight": (2,),
    },
    "Stable Diffusion 2": {
        "conv_in.weight": (2,),
        "time_embedding.linear_1.weight": (2,),
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (2, 1024),
    },
    "Stable Diffusion XL": {
        "model.diffusion_model.input_blocks.0.0.weight": (2,),
        "model.diffusion_model.time_embed.0.weight": (2,),
        "model.diffusion_model.label_emb.0.0.weight": (2,),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (2,),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (2,),
        "conditioner.embedders.1.model.ln_final.weight": (2,),
    },
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (2,), "single_blocks.0.linear1.weight": (2,)},
    "Stable Diffusion 3": {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (2,),
        "text_encoders.clip_g.transformer.text_model.final_layer_norm.weight": (2,),
    },
    "a LoRA": {"lora_unet_down_blocks_0_0_channelwise_0.lora_down.weight": (2,)},
    "a ControlNet of Stable Diffusion": {
        "control_model.input_blocks.0.0.weight": (2,),
        "control_model.time_embed.0.weight": (2,),
    },
    "an autoencoder of Stable Diffusion": {
        "encoder.down_blocks.0.resnets.0.norm1.weight": (2,),
        "decoder.up_blocks.0.resnets.0.norm1.weight": (2,),
    },
    "a text encoder with OpenCLIP's names": {
        "transformer.resblocks.0.attn.in_proj_weight": (2,),
        "ln_final.weight": (2,),
    },
}


@pytest.mark.parametrize("what", SHAPES)
def test_what_another_file_is(refuse: Refuse, tmp_path: Path, what: str) -> None:
    save_file({key: torch.zeros(shape) for key, shape in SHAPES[what].items()}, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors") == (
        f"x.safetensors cannot be used: it is {what}, and nothing of Stable Cascade."
    )


def test_what_is_unknown(refuse: Refuse, tmp_path: Path) -> None:
    save_file({f"layer.{n}.{'x' * 200}": torch.zeros(1) for n in range(900)}, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors").startswith(
        "x.safetensors cannot be used: its tensors (layer.0.xxx"
    )
    save_file({}, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors") == (
        "x.safetensors cannot be used: its tensors (none at all) belong to none of Stable Cascade's networks."
    )


@pytest.mark.parametrize(
    ("wanted", "given", "holds", "option"),
    [
        ("Stage C (prior)", "decoder", "Stage B (decoder)", "--decoder"),
        ("Stage B (decoder)", "prior", "Stage C (prior)", "--prior"),
        ("Stage A (vqgan)", "previewer", "the previewer", "--previewer"),
        ("Stage C (prior)", "controlnet_canny", "a ControlNet of Stable Cascade", "--controlnet"),
        ("Stage C (prior)", "text_encoder", "a text encoder", "--text-encoder"),
    ],
)
def test_another_network_of_cascade_s(
    refuse: Refuse, tmp_path: Path, components: dict[str, Any], wanted: str, given: str, holds: str, option: str
) -> None:
    save_file(components[given].state_dict(), tmp_path / "x.safetensors")
    asked = "--" + wanted.rpartition("(")[2].rstrip(")")
    assert (
        refuse(asked, tmp_path / "x.safetensors") == f"x.safetensors is not {wanted}: it holds {holds}; see {option}."
    )


PICKLE = "{} is a pickle, which can run code when it is read; only safetensors files are opened."


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.ckpt", b"\x80\x02}q\x00.", PICKLE),
        ("x.pth", b"PK\x03\x04", PICKLE),
        ("x.safetensors", b"PK\x03\x04" + bytes(40), PICKLE),
        ("x.gguf", b"GGUF" + bytes(40), "{} is a GGUF file; only safetensors files are opened."),
        ("x.safetensors", b"<!doctype html><html>", "{} is truncated or no safetensors file: "),
        ("x.png", b"\x89PNG" + bytes(40), "{} is not a safetensors file, the only kind that is opened."),
        ("x.safetensors", b"", "{} is truncated or no safetensors file: "),
    ],
)
def test_other_kinds_of_files(refuse: Refuse, tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refuse("--prior", tmp_path / name).startswith(sentence.format(name))


def test_folders_without_weights(refuse: Refuse, tmp_path: Path) -> None:
    assert refuse("--prior", tmp_path / "nowhere") == "There is no file or folder nowhere."
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refuse("--prior", folder).startswith(
        "folder has no weights: it should hold diffusion_pytorch_model.safetensors"
    )
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    assert refuse("--prior", folder) == PICKLE.format("folder/diffusion_pytorch_model.bin")


def write_empty(file: Path, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Path:
    """Write a sparse file of bfloat16 zeros, which takes no space on the disk."""
    header, end = {}, 0
    for key, shape in shapes:
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


@cache
def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    return {key: tuple(one.shape) for key, one in make(variant.network, variant.config).state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "option", "sentence"),
    [
        ("prior", "--prior", "clip_text_in_channels of prior is 1280, but hidden_size of text_encoder is 32."),
        ("prior_lite", "--prior", "clip_text_in_channels of prior is 1280, but hidden_size of text_encoder is 32."),
        (
            "decoder_lite",
            "--decoder",
            "clip_text_pooled_in_channels of decoder is 1280, but projection_dim of text_encoder is 24.",
        ),
    ],
)
def test_the_published_sizes_are_recognised(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str, sentence: str
) -> None:
    """They fit, but not together with the tiny text encoder. The check reads and writes no weights of 7 GB."""
    file = write_empty(tmp_path / "x.safetensors", theirs_shapes(published_shapes(name)))
    monkeypatch.delattr(reading, "read_shares")  # by which tensors are read
    told = refuse(option, file)
    component = name.removesuffix("_lite")
    assert told == f"In weights/mine, {component} and text_encoder would not fit each other: {sentence}"


def theirs_shapes(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return [(key, tuple(tensor.shape)) for key, tensor in theirs(empty).items()]


def test_a_tensor_that_does_not_fit(refuse: Refuse, tmp_path: Path) -> None:
    shapes = dict(published_shapes("prior_lite"))
    shapes["down_blocks.1.3.channelwise.0.weight"] = (6144, 1535)
    assert refuse("--prior", write_empty(tmp_path / "x.safetensors", shapes.items())) == (
        "x.safetensors: down_blocks.1.3.channelwise.0.weight has the shape (6144, 1535) instead of (6144, 1536); it is like "
        "the lite Stage C (prior), but not quite."
    )


@pytest.mark.slow
def test_a_lite_network_with_the_full_one_s_configuration(refuse: Refuse, tmp_path: Path) -> None:
    full_shapes, lite_shapes = published_shapes("prior"), published_shapes("prior_lite")
    key = next(key for key in full_shapes if full_shapes[key] != lite_shapes[key])
    folder = tmp_path / "mine"
    folder.mkdir()
    full = next(variant for variant in VARIANTS if variant.name == "prior")
    make(full.network, full.config).save_config(folder)
    write_empty(folder / "diffusion_pytorch_model.safetensors", published_shapes("prior_lite").items())
    assert refuse("--prior", folder) == (
        f"mine: {key} has the shape {lite_shapes[key]} instead of {full_shapes[key]}, by config.json; it is the lite "
        "Stage C (prior)."
    )


@pytest.mark.slow
def test_a_size_that_was_never_published(refuse: Refuse, tmp_path: Path, model_folder: Path) -> None:
    """A network whose size is neither the model's nor a published one needs a config.json."""
    shapes = {
        key: tuple(2 * side if side == 16 else side for side in shape)
        for key, shape in published_shapes("prior").items()
    }
    shapes["down_blocks.1.0.depthwise.weight"] = (512, 1, 3, 3)
    assert refuse("--prior", write_empty(tmp_path / "x.safetensors", shapes.items())) == (
        "x.safetensors does not fit, and has no config.json beside it: it is Stage C (prior) of width 512; published widths are "
        "2048 or 1536."
    )


FUSED = "down_blocks.0.2.attention.attn.in_proj_weight"
WIDTH = "down_blocks.1.0.depthwise.weight"
FP8 = torch.zeros(()).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({FUSED: torch.zeros(())}, "x.safetensors cannot be used: {FUSED} has the shape (); its rows must be those"),
        ({FUSED: torch.zeros(7, 3)}, "x.safetensors cannot be used: {FUSED} has the shape (7, 3); its rows must be"),
        ({FUSED: torch.zeros(2)}, "x.safetensors cannot be used: {FUSED} has the shape (2,); its rows must be those"),
        ({WIDTH: torch.zeros(())}, "x.safetensors: {WIDTH} has the shape () instead of (16, 1, 3, 3), by "),
        (
            {"clf.1.weight": FP8, "clf.1.scale_weight": torch.ones(())},
            "x.safetensors: clf.1.weight has the shape () instead of (16, 16, 1, 1), by ",
        ),
        (
            {"clf.1.weight": FP8, "clf.1.scale_weight": torch.ones(3)},
            "x.safetensors cannot be used: clf.1.weight has 3 scales; it must have one in all, or one per row.",
        ),
    ],
)
def test_shapes_that_no_network_has(
    refuse: Refuse, tmp_path: Path, components: dict[str, Any], change: StateDict, sentence: str
) -> None:
    weights = theirs(components["prior"].state_dict())
    assert FUSED in weights
    assert WIDTH in weights
    save_file({**weights, **change}, tmp_path / "x.safetensors")
    sentence = sentence.replace("{FUSED}", FUSED.replace("attention.attn", "attention")).replace("{WIDTH}", WIDTH)
    assert refuse("--prior", tmp_path / "x.safetensors").startswith(sentence)


def test_a_projection_of_another_shape(refuse: Refuse, tmp_path: Path, components: dict[str, Any]) -> None:
    weights = comfy_text_encoder(components["text_encoder"].state_dict())
    save_file({**weights, "text_encoder.clip_g.text_projection": torch.zeros(2, 2, 2)}, tmp_path / "x.safetensors")
    assert refuse("--text-encoder", tmp_path / "x.safetensors") == (
        "x.safetensors cannot be used: text_projection has the shape (2, 2, 2); it must have 2 dimensions."
    )


def test_what_is_missing_of_the_size_that_is_there(refuse: Refuse, tmp_path: Path, components: dict[str, Any]) -> None:
    """If a file is similar to the model's own network, the error names the tensor, not a published size."""
    weights = components["prior"].state_dict()
    del weights["clf.1.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors").startswith("x.safetensors has no tensor clf.1.bias, by ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(refuse: Refuse, tmp_path: Path, components: dict[str, Any], value: float) -> None:
    """Like the weights of a diverged training: every picture would fail."""
    weights = components["prior"].state_dict()
    weights = {**weights, "clf.1.bias": torch.full_like(weights["clf.1.bias"], value)}
    save_file(weights, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors") == (
        "x.safetensors cannot be used: clf.1.bias holds infinite or NaN values."
    )


def test_double_precision_is_not_kept(save: Save, tmp_path: Path, components: dict[str, Any]) -> None:
    weights = {
        key: one.double() if one.is_floating_point() else one for key, one in components["vqgan"].state_dict().items()
    }
    save_file(weights, tmp_path / "a.safetensors")
    (file,) = save("--vqgan", tmp_path / "a.safetensors").parts["vqgan"].glob("*.safetensors")
    assert torch.float64 not in {tensor.dtype for tensor in load_file(file).values()}


def test_a_network_for_a_tokenizer(refuse: Refuse, tmp_path: Path, components: dict[str, Any]) -> None:
    save_file(components["prior"].state_dict(), tmp_path / "x.safetensors")
    assert refuse("--tokenizer", tmp_path / "x.safetensors") == (
        "x.safetensors is not the tokenizer: it holds Stage C (prior); see --prior."
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("[]", "it is not a JSON object."),
        ('{"c_hidden": [16, 16]}', "it lacks 'num_attention_heads'."),
        ('{"num_attention_heads": [0, 0]}', "num_attention_heads, 0, does not divide block_out_channels, 2048."),
        ("[" * 100_000, None),
    ],
)
def test_configurations_that_describe_nothing(
    refuse: Refuse, tmp_path: Path, components: dict[str, Any], config: str, sentence: str | None
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    save_file(components["prior"].state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(config)
    told = refuse("--prior", folder)
    if sentence is None:
        assert told.startswith("mine/config.json is not valid JSON: ")
    else:
        assert told == f"mine/config.json does not describe the prior: {sentence}"


def test_integers_are_refused(refuse: Refuse, tmp_path: Path, components: dict[str, Any]) -> None:
    weights = components["prior"].state_dict()
    weights = {**weights, "clf.1.weight": weights["clf.1.weight"].to(torch.int8)}
    save_file(weights, tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors") == (
        "x.safetensors: clf.1.weight is stored as int8; only floating point is read."
    )


@pytest.mark.parametrize(
    ("add", "sentence"),
    [
        (
            {"vae.encoder.mean": torch.zeros(3)},
            "its semantic encoder normalises with the mean [0.0, 0.0, 0.0], not (0.485",
        ),
        ({"model.diffusion_model.clf.1.scale_weight": torch.ones(())}, "clf.1.weight has a scale, but is stored as"),
        (
            {"ema.clip_txt_mapper.weight": torch.ones(1)},
            "it holds Stage C (prior) twice, under ",
        ),
    ],
)
def test_what_is_odd(refuse: Refuse, tmp_path: Path, components: dict[str, Any], add: StateDict, sentence: str) -> None:
    save_file({**comfy_stage_c(components), **add}, tmp_path / "x.safetensors")
    option = "--effnet" if "vae.encoder.mean" in add else "--prior"
    assert refuse(option, tmp_path / "x.safetensors").startswith(f"x.safetensors cannot be used: {sentence}")


def test_a_model_that_would_lack_something(refuse: Refuse, tmp_path: Path, components: dict[str, Any]) -> None:
    save_file(components["prior"].state_dict(), tmp_path / "x.safetensors")
    assert refuse("--prior", tmp_path / "x.safetensors", base=tmp_path / "nowhere") == (
        "weights/mine would have no decoder and no text_encoder and no tokenizer and no vqgan: run "
        "scripts/download-weights first, or name a model folder that has them with --base."
    )
