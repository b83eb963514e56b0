"""Every spelling and every container of adapters; damaged files and those of other models end in one sentence."""

import gzip
import io
import json
import pickle
import random
import re
import shutil
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from cascade.networks.unet import StableCascadeUNet
from cascade.weights import making, variants
from cascade.weights.errors import WeightsError
from cascade.weights.lora import Adapter, Placed, algorithms, files, merged, patterns, place
from cascade.weights.lora.layers import Layers
from cascade.weights.lora.words import TABLE
from tests.weights.lora.networks import FOLDER, shapes, text_encoder, unet

LEGACY = "onetrainer_legacy"


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.adapter.safetensors"


@cache
def networks() -> dict[str, dict[str, tuple[int, ...]]]:
    return {"prior": shapes(unet("stage_c")), "text_encoder": shapes(text_encoder())}


def placed(path: Path) -> Placed:
    return place(Adapter.read(path), networks())


def trained(adapter: Placed) -> dict[str, Tensor]:
    """All weights that an adapter changes."""
    states = {"prior": unet("stage_c").state_dict(), "text_encoder": text_encoder().state_dict()}
    return {
        f"{network}.{name}": merged(states[network][name], [(change, 1.0) for change in several])
        for network, changes in adapter.changes.items()
        for name, several in changes.items()
    }


def same(one: Placed, other: Placed) -> None:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def renamed(name: str, rename: Callable[[str], str], folder: Path) -> Path:
    stored = load_file(file_of(name))
    path = folder / "one.safetensors"
    save_file({rename(key): tensor for key, tensor in stored.items()}, path)
    return path


def before_20_february(key: str) -> str:
    return key.replace("attention_attn_out_proj", "attention_to_out_0").replace("attention_attn_to", "attention_to")


def from_20_to_23_february(key: str) -> str:
    return key.replace("attention_attn_out_proj", "attention_attn_to_out_proj")


def dotted(key: str) -> str:
    """kohya's flat name of a layer with dots."""
    key = re.sub(r"_(\d+)_", r".\1.", re.sub(r"_(\d+)_", r".\1.", key))
    names = (
        "text_model",
        "self_attn",
        "k_proj",
        "q_proj",
        "v_proj",
        "out_proj",
        "text_projection",
        "down_blocks",
        "up_blocks",
    )
    kept = {name: name.replace("_", "-") for name in (*names, "lora_down", "lora_up", "in_proj")}
    for name, mark in kept.items():
        key = key.replace(name, mark)
    key = key.replace("_", ".")
    for name, mark in kept.items():
        key = key.replace(mark, name)
    return key


def omi(key: str) -> str:
    key = key.replace("lora_prior_unet_", "unet_").replace("lora_prior_te_", "clip-g_")
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        key = key.replace(f"attn_{name}", f"attn_in_proj_{i}.").replace("..", ".")
    return dotted(key).replace("clip-g", "clip_g").replace("in_proj.", "in_proj.")


@pytest.mark.parametrize(
    ("rename", "format"),
    [
        (before_20_february, "OneTrainer's format before 20 February 2024"),
        (from_20_to_23_february, "OneTrainer's format of 20 to 23 February 2024"),
        (omi, "OneTrainer's format OMI_LORA (April 2025 to July 2026)"),
    ],
)
def test_onetrainers_earlier_spellings(rename: Callable[[str], str], format: str, tmp_path: Path) -> None:
    path = renamed(LEGACY, rename, tmp_path)
    assert placed(path).adapter.format == format
    same(placed(path), placed(file_of(LEGACY)))


def test_onetrainers_joined_magnitudes(tmp_path: Path) -> None:
    path = renamed("onetrainer_dora_legacy", lambda key: key.replace(".dora_scale", "_dora_scale"), tmp_path)
    same(placed(path), placed(file_of("onetrainer_dora_legacy")))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_A", "lora_B"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_down", "lora_up"),
    ],
)
def test_spellings_of_factors(down: str, up: str, tmp_path: Path) -> None:
    path = renamed(LEGACY, lambda key: key.replace("lora_down.weight", down).replace("lora_up.weight", up), tmp_path)
    same(placed(path), placed(file_of(LEGACY)))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("kohya", "kohya's format (since 25 February 2024; ComfyUI's names)"),
        ("kohya_2024_02_22", "kohya's format of 22 to 25 February 2024"),
        ("kohya_2024_02_19", "kohya's format before 22 February 2024 (without attention)"),
        ("comfy_extract", "ComfyUI's format"),
        ("onetrainer_legacy", "OneTrainer's format LEGACY_LORA (since 23 February 2024)"),
        ("onetrainer_kohya", "OneTrainer's format KOHYA_LORA (since July 2026)"),
        ("onetrainer_diffusers", "OneTrainer's format DIFFUSERS_LORA"),
        ("onetrainer_all_original", "OneTrainer's format ORIGINAL_LORA"),
        ("onetrainer_all_comfy", "OneTrainer's format COMFY_LORA"),
        ("onetrainer_loha_2025", "OneTrainer's format LEGACY_LORA (April 2025 to July 2026)"),
        ("lycoris_lora", "LyCORIS' format (SimpleTuner)"),
        ("diffusers_lora", "diffusers' format"),
        ("embedding", "a textual inversion"),
    ],
)
def test_formats_are_named(name: str, format: str) -> None:
    assert Adapter.read(file_of(name)).format == format


def test_summary_says_what_was_placed_where() -> None:
    assert placed(file_of("kohya")).summary == (
        "237 of 237 tensors placed: 67 layers of Stage C (prior), 12 layers of the text encoder"
    )
    assert placed(file_of("embedding")).summary == "1 of 1 tensors placed: words embedding.adapter (2 tokens)"


# Containers


def archive(folder: Path, names: Mapping[str, Path], kind: str) -> Path:
    path = folder / f"one.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, source in names.items():
                file.write(source, name)
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as file:
            for name, source in names.items():
                file.add(source, name)
    return path


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives(kind: str, tmp_path: Path) -> None:
    other = tmp_path / "config.yaml"
    other.write_text("x")
    path = archive(tmp_path, {"output/lora.safetensors": file_of(LEGACY), "output/config.yaml": other}, kind)
    same(placed(path), placed(file_of(LEGACY)))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_of_pefts_folder(kind: str, tmp_path: Path) -> None:
    source = FOLDER / "peft_lora"
    names = {f"step10/{file.relative_to(source)}": file for file in source.rglob("*") if file.is_file()}
    same(placed(archive(tmp_path, names, kind)), placed(source))


def test_folder_of_pefts_folders(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "peft_lora", tmp_path / "prior")
    shutil.move(tmp_path / "prior" / "text_encoder", tmp_path / "text_encoder")
    same(placed(tmp_path), placed(FOLDER / "peft_lora"))


def test_pefts_file_finds_its_configuration(tmp_path: Path) -> None:
    one = placed(FOLDER / "peft_dora" / "adapter_model.safetensors")
    same(one, placed(FOLDER / "peft_dora"))
    shutil.copy(FOLDER / "peft_dora" / "adapter_model.safetensors", tmp_path)
    with pytest.raises(WeightsError, match=r"needs adapter_config.json beside it, which says alpha"):
        Adapter.read(tmp_path / "adapter_model.safetensors")


def test_archives_of_several_adapters_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path, {"a.safetensors": file_of(LEGACY), "b.safetensors": file_of("kohya")}, "tar")
    with pytest.raises(
        WeightsError, match=r"holds 2 safetensors files, a.safetensors, b.safetensors; it must hold one"
    ):
        Adapter.read(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name, content in {
        "a.pt": pickle.dumps({"weights.0.lora_down": 1}),
        "b.safetensors": pickle.dumps({}),
        "c.bin": _torch_file(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="is a pickle"):
            Adapter.read(tmp_path / name)
    inside = archive(tmp_path, {"x/lora.ckpt": tmp_path / "a.pt"}, "zip")
    with pytest.raises(WeightsError, match="is a pickle"):
        Adapter.read(inside)


def _torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"weights.0.lora_down": torch.zeros(1)}, file)
    return file.getvalue()


_FLOAT4 = b'{"a.diff":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
FLOAT4 = len(_FLOAT4).to_bytes(8, "little") + _FLOAT4 + b"\0"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.safetensors", None, "There is no file or folder"),
        ("empty.safetensors", b"", "truncated or no safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "truncated or no safetensors file"),
        ("page.txt", b"<!DOCTYPE html><html>", "is not a safetensors file, the only kind that is opened"),
        ("nothing.safetensors", save({}), "holds no tensors"),
        ("nothing.zip", b"PK\x05\x06" + bytes(18), "holds no safetensors file"),
        ("bool.safetensors", save({"a.alpha": torch.tensor(True)}), "stored as bool"),
        ("nan.safetensors", save({"a.alpha": torch.tensor(torch.nan)}), "infinite or no numbers"),
        (
            "float8.safetensors",
            save({"a.diff": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)}),
            "infinite or no numbers",
        ),
        ("float64.safetensors", save({"a.diff": torch.tensor([1e300], dtype=torch.float64)}), "infinite or no numbers"),
        ("uint64.safetensors", save({"embeddings.indices": torch.ones(1, dtype=torch.uint64)}), "stored as uint64"),
        ("scales.safetensors", save({"a.diff": torch.ones(2).to(torch.float8_e8m0fnu)}), "stored as float8_e8m0fnu"),
        ("float4.safetensors", FLOAT4, "stored as float4_e2m1fn_x2"),
        ("cut.tar.gz", gzip.compress(random.Random(0).randbytes(5000))[:300], "damaged tar file"),
    ],
)
def test_damaged_files(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(said)):
        Adapter.read(tmp_path / name)


def _headers(kind: bytes, size: int) -> bytes:
    """A tar that begins with a header of headers, such as of a long name, of many bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(size), 1)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_of_a_tar_have_a_limit(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(_headers(kind, files.MOST_HEADER + 1))
    with pytest.raises(WeightsError, match="damaged tar file: a header has over 1 MB"):
        Adapter.read(tmp_path / "a.tar.gz")


def test_sparse_files_in_a_tar_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.safetensors")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"00000010000\0"  # the real size; no map of what is stored
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(WeightsError, match=r"damaged tar file: a\.safetensors is a sparse file"):
        Adapter.read(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "folder"])
def test_large_documents_are_refused_before_they_are_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "a.json").write_bytes(bytes(files.MOST_JSON + 1))
    if kind != "folder":
        path = archive(tmp_path, {"a.json": path / "a.json"}, kind)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=r"a\.json has over 4 MB"):
        Adapter.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < files.MOST_JSON


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "folder"])
def test_archives_are_not_read_into_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the tensors, of which there is one copy. Nothing of them is left on the disk."""
    path, temporary = tmp_path / "folder", tmp_path / "temporary"
    path.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    size = 20_000_000
    save_file({"lora_unet_a.diff": torch.ones(size // 4)}, path / "a.safetensors")
    if kind != "folder":
        path = archive(tmp_path, {"a.safetensors": path / "a.safetensors"}, kind)
    tracemalloc.start()
    (stored,) = files.read(path).files
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stored.tensors["lora_unet_a.diff"].sum() == size // 4
    assert peak < size / 2
    assert list(temporary.iterdir()) == []


def test_words_without_a_name_are_refused(tmp_path: Path) -> None:
    width = shapes(text_encoder())[TABLE][1]
    for name, key in {".safetensors": "clip_g", "a.safetensors": "bundle_emb. .clip_g"}.items():
        save_file({key: torch.zeros(1, width)}, tmp_path / name)
        with pytest.raises(WeightsError, match=f"the first without is {key}"):
            placed(tmp_path / name)


@pytest.mark.parametrize(
    "tensors",
    [
        {"prior.clf.1.bias.diff": torch.zeros(16), "prior.clf.1.bias.alpha": torch.zeros(2)},
        {"prior.clip_txt_mapper.oft_R.weight": torch.zeros(1, 1, 1)},
        {"prior.clip_txt_mapper.oft_R.weight": torch.zeros(1, 2)},
    ],
)
def test_tensors_with_too_many_numbers_or_dimensions(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="tensors have a place"):
        placed(tmp_path / "a.safetensors")


# What no file says


def authors_file(folder: Path, name: str = "authors_attn", told: Any = None) -> Path:
    shutil.copy(file_of(name), folder / "one.safetensors")
    if told is not None:
        (folder / "one.json").write_text(json.dumps(told))
    return folder / "one.safetensors"


def authors_place(path: Path, others: tuple[Path, ...] = (), size: int = 523) -> Placed:
    known = {"prior": shapes(unet("authors_attn")), "text_encoder": shapes(text_encoder("authors_attn"))}
    return place(Adapter.read(path, others), known, {f"word{i}</w>": i for i in range(size)})


def test_authors_attention_is_recognised_by_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        adapter = authors_place(authors_file(tmp_path))
    assert len(adapter.changes["prior"]) == 4 * 6
    assert [word.name for word in adapter.words] == ["[word1]"]
    assert "those that the filter .attn chooses" in caplog.text
    assert "they are called [word1]" in caplog.text


def test_authors_other_filters_must_be_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"give module_filters in a JSON file of its name beside it: 0 of 74"):
        authors_place(authors_file(tmp_path, "authors_wide"))


def test_authors_settings_come_from_elsewhere(tmp_path: Path) -> None:
    path = authors_file(tmp_path)
    told = {"module_filters": [".attn"], "train_tokens": [["[fernando]", "^word1"]]}
    (tmp_path / "other.json").write_text(json.dumps(told))
    adapter = authors_place(path, (tmp_path / "missing.json", tmp_path / "other.json"))
    assert [word.name for word in adapter.words] == ["[fernando]"]
    tarred = archive(tmp_path, {"a/x.safetensors": path, "a/settings.json": tmp_path / "other.json"}, "tar")
    assert [word.name for word in authors_place(tarred).words] == ["[fernando]"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"module_filters": ".attn"}, "module_filters is '.attn'; it must be a list of texts"),
        ({"module_filters": [".attn"], "train_tokens": "x"}, "train_tokens is 'x'; it must be a list"),
        ({"train_tokens": [["a", 3]]}, "each must be [name, regular expression or null]"),
        ({"train_tokens": [["[a]", "("]]}, "is not a valid pattern"),
        ({"module_filters": ["channelwise"], "train_tokens": [["[a]", None]]}, "module_filters (channelwise)"),
        ({"train_tokens": []}, "learned words that do not fit"),
        ([], "is not a JSON object"),
    ],
)
def test_wrong_settings(told: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(said)):
        authors_place(authors_file(tmp_path, told=told))


def test_regular_expressions_have_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(WeightsError, match="takes too long"):
        patterns.matching("(w|wo|o|r|d|or)+$", [*("short" for _ in range(1000)), "word" * 60 + "!"], "settings.json")
    assert patterns.matching("^dog</w>", ["dog</w>", "dog", "hotdog</w>"], "settings.json") == ["dog</w>"]


def test_words_of_another_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has learned words that do not fit this model's vocabulary"):
        authors_place(authors_file(tmp_path), size=500)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; only LORA, LOHA, LOKR, OFT, IA3"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; it must be a positive number"),
        ({"r": 0}, "r is 0; it must be a positive number"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]; it must be an object"),
        ({"rank_pattern": {"(": 3}}, "is not a valid pattern"),
    ],
)
def test_pefts_configuration(change: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    shutil.copytree(FOLDER / "peft_lora", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if said is None:
        placed(folder)
        return
    with pytest.raises(WeightsError, match=re.escape(said)):
        placed(folder)


# Other models


def factors(*names: str, size: int = 8, text: int = 768, rank: int = 4) -> dict[str, Tensor]:
    result = {}
    for name in names:
        inputs = text if "attn2" in name or "_te" in name else size
        result[f"{name}.lora_down.weight"] = torch.zeros(rank, inputs)
        result[f"{name}.lora_up.weight"] = torch.zeros(size, rank)
        result[f"{name}.alpha"] = torch.tensor(1.0)
    return result


ATTENTION = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (factors(ATTENTION, "lora_te_text_model_encoder_layers_0_mlp_fc1"), "is for Stable Diffusion 1.5,"),
        (factors(ATTENTION, text=1024), "is for Stable Diffusion 2,"),
        (
            factors("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", text=2048),
            "is for Stable Diffusion XL,",
        ),
        (factors("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "is for Stable Diffusion XL,"),
        (factors("lora_unet_double_blocks_0_img_attn_proj"), "is for Flux,"),
        (factors("transformer.single_transformer_blocks.0.attn.to_q"), "is for Flux,"),
        (factors("diffusion_model.joint_blocks.0.x_block.attn.qkv"), "is for Stable Diffusion 3,"),
        (factors("diffusion_model.blocks.0.self_attn.q"), "is for Wan,"),
        (factors("lora_unet_something_else"), "does not fit this model"),
        ({"emb_params": torch.zeros(2, 768)}, "is for a textual inversion"),
    ],
)
def test_other_models_adapters_are_called_what_they_are(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match=rf"{re.escape(said)}.*: 0 of {len(tensors)} tensors have a place") as caught:
        placed(tmp_path / "one.safetensors")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("prefixes", "said"),
    [
        ({"prior": ""}, "Stage C (prior) whole; scripts/save-weights --prior FILE makes"),
        ({"decoder": "model.diffusion_model."}, "Stage B (decoder) whole; scripts/save-weights --decoder FILE makes"),
        ({"vqgan": ""}, "Stage A (vqgan) whole; scripts/save-weights --vqgan FILE makes"),
        (
            {"prior": "model.diffusion_model.", "text_encoder": "text_encoders.clip_g.transformer."},
            "Stage C (prior) and a text encoder whole; scripts/save-weights --prior FILE --text-encoder FILE makes",
        ),
    ],
)
def test_a_whole_network_is_called_what_it_is(
    components: dict[str, Any], prefixes: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small and as large as the published ones, which are larger than an adapter may be."""
    tensors = {
        f"{prefix}{key}": tensor.clone()
        for name, prefix in prefixes.items()
        for key, tensor in components[name].state_dict().items()
    }
    save_file(tensors, tmp_path / "one.safetensors")
    for most in (files.MOST, 10_000):
        monkeypatch.setattr(files, "MOST", most)
        with pytest.raises(WeightsError, match=re.escape(f"is not an adapter but holds {said}")):
            placed(tmp_path / "one.safetensors")


@cache
def published(name: str) -> dict[str, tuple[int, ...]]:
    (variant,) = (one for one in variants.VARIANTS if one.name == name)
    return shapes(making.make(variant.network, variant.config))


def test_the_other_size_is_named(tmp_path: Path) -> None:
    lite = published("prior_lite")
    names = [name.removesuffix(".weight") for name in lite if name.endswith("to_q.weight")]
    save_file(factors(*(f"prior.{name}" for name in names), size=1536), tmp_path / "one.safetensors")
    assert len(place(Adapter.read(tmp_path / "one.safetensors"), {"prior": lite}).changes["prior"]) == 32
    with pytest.raises(
        WeightsError, match=r"is for a Stage C of the width 1536, the lite one; this model's has 2048: 0 of"
    ):
        place(Adapter.read(tmp_path / "one.safetensors"), {"prior": published("prior")})


def test_the_other_size_in_the_authors_format(tmp_path: Path) -> None:
    pairs = {}
    for i in range(64):  # output, then q, k and v in one
        pairs[f"weights.{i}.lora_down"] = torch.zeros(4, 1536)
        pairs[f"weights.{i}.lora_up"] = torch.zeros(3 * 1536 if i % 2 else 1536, 4)
    save_file(pairs, tmp_path / "one.safetensors")
    assert (
        len(place(Adapter.read(tmp_path / "one.safetensors"), {"prior": published("prior_lite")}).changes["prior"])
        == 128
    )
    with pytest.raises(WeightsError, match="is for a Stage C of the width 1536, the lite one; this model's has 2048"):
        place(Adapter.read(tmp_path / "one.safetensors"), {"prior": published("prior")})


@pytest.mark.parametrize("name", ["prior", "prior_lite", "decoder", "decoder_lite", "text_encoder"])
def test_no_two_layers_have_a_spelling_in_common(name: str) -> None:
    from cascade.weights.lora.layers import flat, spellings

    layers = Layers(published(name))
    for tensor in published(name):
        layer, _, kind = tensor.rpartition(".")
        for spelled in spellings(layer):
            assert layers.layer(spelled) == layers.layer(flat(spelled)) == (layer,)
            assert layers.tensor(f"{spelled}.{kind}") == tensor


def test_depthwise_convolutions_of_onetrainer_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = load_file(file_of("onetrainer_legacy"))
    name = "lora_prior_unet_down_blocks_0_0_depthwise"
    more = {
        f"{name}.lora_down.weight": torch.ones(3, 32, 3, 3),
        f"{name}.lora_up.weight": torch.ones(1, 3, 1, 1),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(stored | more, tmp_path / "one.safetensors")
    adapter = placed(tmp_path / "one.safetensors")
    same(adapter, placed(file_of("onetrainer_legacy")))
    assert set(adapter.ignored) == set(more)
    assert "3 tensors of depthwise convolutions, trained as convolutions of all channels, are left out" in caplog.text
    assert "111 of 114 tensors placed, 3 of no meaning here" in adapter.summary


def test_norms_and_whole_tensors(tmp_path: Path) -> None:
    norm, response = "text_model.encoder.layers.0.layer_norm1", "down_blocks.0.0.channelwise.2.gamma"
    save_file(
        {
            f"lora_te_{norm.replace('.', '_')}.w_norm": torch.full((24,), 0.5),
            f"lora_te_{norm.replace('.', '_')}.b_norm": torch.full((24,), 0.25),
            f"diffusion_model.{response}.diff": torch.full((1, 1, 1, 128), 0.5),
            "diffusion_model.clf.1.bias.set_weight": torch.full((16,), 3.0),
        },
        tmp_path / "one.safetensors",
    )
    result = trained(placed(tmp_path / "one.safetensors"))
    encoder, network = text_encoder().state_dict(), unet("stage_c").state_dict()
    assert torch.equal(result[f"text_encoder.{norm}.weight"], encoder[f"{norm}.weight"] + 0.5)
    assert torch.equal(result[f"text_encoder.{norm}.bias"], encoder[f"{norm}.bias"] + 0.25)
    assert torch.equal(result[f"prior.{response}"], network[response] + 0.5)
    assert result["prior.clf.1.bias"].sub(3).abs().max() < 1e-6


# Whatever else is wrong with a file

EXAMPLES = ("kohya", "onetrainer_legacy", "comfy_extract", "lycoris_loha_tucker", "lycoris_lokr_both", "lycoris_oft")
SHAPES = st.lists(st.integers(0, 5), max_size=4)
KINDS = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8])


@pytest.mark.slow
@settings(deadline=None, max_examples=60, phases=(Phase.generate,))  # shrinking would take minutes
@given(data=st.data())
def test_every_wrong_file_gives_one_sentence(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(EXAMPLES))
    stored = load_file(file_of(name))
    keys = sorted(stored)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        what = data.draw(st.sampled_from(["drop", "rename", "shape", "kind", "add"]))
        tensor = stored.pop(key, torch.zeros(1))
        if what == "rename":
            stored[data.draw(st.text(max_size=12)) + key[data.draw(st.integers(0, len(key))) :]] = tensor
        elif what == "shape":
            stored[key] = torch.ones(data.draw(SHAPES))
        elif what == "kind":
            stored[key] = tensor.to(data.draw(KINDS))
        elif what == "add":
            stored |= {key: tensor, data.draw(st.text(min_size=1, max_size=20)): torch.ones(data.draw(SHAPES))}
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in stored.items()}, path)
    check_outcome(path)


def stored_as(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]]) -> Path:
    """A safetensors file with the tensors in this order, which `save_file` would change."""
    header, data = {}, b""
    for key, (kind, shape, content) in tensors.items():
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_tensors_may_lie_anywhere_in_a_file(tmp_path: Path) -> None:
    """Also where no tensor of their dtype may lie in memory; several threads read them in blocks."""
    matrix, bias = torch.randn(64, 64), torch.randn(64).half()
    path = stored_as(
        tmp_path / "one.safetensors",
        {
            "a.x": ("U8", [3], b"abc"),
            "b.x": ("F32", [64, 64], matrix.numpy().tobytes()),
            "c.x": ("F16", [64], bias.numpy().tobytes()),
            "d.x": ("F32", [0, 4], b""),
            "e.x": ("F32", [], torch.tensor(2.5).numpy().tobytes()),
            "f.x": ("I64", [1], torch.tensor([7]).numpy().tobytes()),
        },
    )
    (stored,) = files.read(path).files
    assert torch.equal(stored.tensors["a.x"], torch.tensor(list(b"abc"), dtype=torch.uint8))
    assert torch.equal(stored.tensors["b.x"], matrix)
    assert torch.equal(stored.tensors["c.x"], bias)
    assert stored.tensors["d.x"].shape == (0, 4)
    assert stored.tensors["e.x"] == 2.5
    assert stored.tensors["f.x"].tolist() == [7]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_the_tensor_with_a_wrong_number_is_named(kind: torch.dtype, wrong: float, tmp_path: Path) -> None:
    """Not its neighbours, whose values are finite, though their sums are not."""
    most = torch.finfo(kind if kind.itemsize < 8 else torch.float32).max
    tensors = {f"x{i}.diff": torch.full((300,), most).to(kind) for i in range(4)}
    save_file(tensors, tmp_path / "one.safetensors")
    assert len(Adapter.read(tmp_path / "one.safetensors").groups) == 4
    tensors["x2.diff"][299] = wrong
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match=r"one\.safetensors: x2\.diff holds values that are infinite or no numbers"):
        Adapter.read(tmp_path / "one.safetensors")


def test_words_do_not_keep_the_memory_of_their_file(tmp_path: Path) -> None:
    width = networks()["text_encoder"][TABLE][1]
    words = {f"bundle_emb.<{name}>.{kind}": torch.ones(2, width) for name in "ab" for kind in ("clip_g", "clip_g_out")}
    save_file(words, tmp_path / "one.safetensors")
    for word in placed(tmp_path / "one.safetensors").words:
        assert word.vectors.untyped_storage().nbytes() == 2 * width * 4
        assert word.outputs.untyped_storage().nbytes() == 2 * width * 4


def check_outcome(path: Path) -> None:
    """All of a file is placed, and gives finite weights of the right shape; or one sentence says what is wrong with it."""
    try:
        adapter = placed(path)
    except WeightsError as error:
        said = str(error)
        assert said.startswith(str(path)[:40])
        assert "\n" not in said
        assert len(said) < 400
        kinds = (" tensors have a place", "truncated", "holds", "stored as", "is a pickle")
        assert any(kind in said for kind in kinds)
        return
    for tensor in trained(adapter).values():
        assert tensor.dtype == torch.float32
    count = sum(len(several) for changes in adapter.changes.values() for several in changes.values())
    assert count or adapter.words


@settings(deadline=None, max_examples=40)
@given(where=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans(), head=st.booleans())
def test_damaged_bytes(
    where: float, byte: int, cut: bool, head: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(file_of("lycoris_lokr").read_bytes())
    place = int(where * (2000 if head else len(content) - 1))
    if cut:
        del content[place:]
    else:
        content[place] = byte
    path = tmp_path_factory.mktemp("one") / "one.safetensors"
    path.write_bytes(content)
    check_outcome(path)


def test_shapes_alone_place_an_adapter_of_the_published_size(tmp_path: Path) -> None:
    """As large as it gets in layers: every Linear and 1x1 convolution of Stage C."""
    names = [
        name.removesuffix(".weight")
        for name, shape in published("prior").items()
        if name.endswith(".weight") and len(shape) > 1 and "depthwise" not in name
    ]
    stored = {}
    for name in names:
        rows, columns, *kernel = published("prior")[f"{name}.weight"]
        stored[f"unet.{name}.lora_A.weight"] = torch.zeros(1, columns, *kernel, dtype=torch.bfloat16)
        stored[f"unet.{name}.lora_B.weight"] = torch.zeros(rows, 1, *kernel, dtype=torch.bfloat16)
    save_file(stored, tmp_path / "one.safetensors")
    adapter = place(Adapter.read(tmp_path / "one.safetensors"), {"prior": published("prior")})
    assert len(adapter.changes["prior"]) == len(names)
    assert issubclass(variants.VARIANTS[0].network, StableCascadeUNet)


@given(
    weight=st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda shape: len(shape) != 3),
    up=st.lists(st.integers(1, 4), max_size=4),
    down=st.lists(st.integers(1, 4), max_size=4),
)
@example([4, 1, 3, 3], [4, 2], [2, 1])
@example([4, 1, 3, 3], [4, 2, 1, 1], [2, 1, 3, 3])
@example([4, 3, 1, 1], [4, 2, 1, 1], [2, 3])
def test_which_factors_fit_is_what_their_product_says(weight: list[int], up: list[int], down: list[int]) -> None:
    try:
        delta = algorithms.lora(torch.zeros(weight), {"up": torch.zeros(up), "down": torch.zeros(down)}, 1.0)
        fits = list(delta.shape) == weight
    except (RuntimeError, ValueError, IndexError):
        fits = False
    assert algorithms.lora_fits(weight, up, down) == fits
