"""Adapters of every program, as it wrote them, against what it computes with them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from cascade.weights.lora import Adapter, Placed, place
from tests.weights.lora.networks import (
    FOLDER,
    changed,
    description,
    encode,
    shapes,
    tensors,
    text_encoder,
    unet,
    with_words,
)

TOLERANCE = 1e-4
# Rows of the README's table whose file is not to be equalled.
RECORDS = re.findall(r"^\| (\w+) \|.*\ba record\b.*\|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
NAMES = sorted(
    name
    for file in FOLDER.glob("*.json")
    if (name := file.stem) not in RECORDS
    and ((FOLDER / f"{name}.adapter.safetensors").is_file() or (FOLDER / name / "adapter_config.json").is_file())
)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def file_of(name: str) -> Path:
    file = FOLDER / f"{name}.adapter.safetensors"
    return file if file.is_file() else FOLDER / name


def strengths(name: str, expected: dict[str, Tensor]) -> list[str]:
    """Those at which the product is to equal the program. Of DoRA at 0.5, trainers mean three different things."""
    return [one for one in ("1", "0.5") if f"out_{one}" in expected and (one == "1" or "dora" not in name)]


@pytest.mark.parametrize("name", NAMES)
def test_lora_fixture(name: str, tmp_path: Path) -> None:
    if "module_filters" in description(name):
        check_authors(name, tmp_path)
    elif "input_ids" in tensors(name):
        check_embedding(name)
    elif "config" in description(name) and "c_effnet" in description(name)["config"]:
        check_stage_b(name)
    else:
        check_stage_c(name)


def test_lora_fixture_without_an_adapter() -> None:
    network, encoder, given, words = unet("stage_c"), text_encoder(), tensors("stage_c"), tensors("text_encoder")
    conditions = network.condition(given["clip_text_pooled"], given["clip_text"], given["clip_img"])
    close(network(given["x"], given["r"], conditions), given["out"])
    hidden, pooled = encode(encoder, words)
    close(hidden[:, description("text_encoder")["rows"]], words["hidden"])
    close(pooled, words["pooled"])


def check_stage_c(name: str) -> None:
    network, encoder, given, expected = unet("stage_c"), text_encoder(), tensors("stage_c"), tensors(name)
    placed = place(Adapter.read(file_of(name)), {"prior": shapes(network), "text_encoder": shapes(encoder)})
    assert strengths(name, expected)
    for one in strengths(name, expected):
        adapted = changed(network, placed, "prior", float(one))
        conditions = given["clip_text_pooled"], given["clip_text"], given["clip_img"]
        close(adapted(given["x"], given["r"], adapted.condition(*conditions)), expected[f"out_{one}"])
        if f"hidden_{one}" in expected:
            adapted = changed(encoder, placed, "text_encoder", float(one))
            hidden, pooled = encode(adapted, tensors("text_encoder"))
            close(hidden[:, description("text_encoder")["rows"]], expected[f"hidden_{one}"])
            close(pooled, expected[f"pooled_{one}"])


def check_stage_b(name: str) -> None:
    network, data = unet(name), tensors(name)
    # Both networks are there, as in a model: names and shapes tell them apart.
    placed = place(Adapter.read(file_of(name)), {"prior": shapes(unet("stage_c")), "decoder": shapes(network)})
    assert set(placed.changes) == {"decoder"}
    inputs = {"clip_text_pooled": data["clip"], "effnet": data["effnet"]}
    close(network(data["x"], data["r"], **inputs), data["out"])
    for one in strengths(name, data):
        close(changed(network, placed, "decoder", float(one))(data["x"], data["r"], **inputs), data[f"out_{one}"])


def place_authors(name: str, folder: Path, settings: dict[str, Any] | None = None) -> Placed:
    """The adapter, with the settings of its training beside it."""
    told = {key: description(name)[key] for key in ("module_filters", "train_tokens")}
    shutil.copy(file_of(name), folder / "one.safetensors")
    (folder / "one.json").write_text(json.dumps(told if settings is None else settings))
    networks = {"prior": shapes(unet(name)), "text_encoder": shapes(text_encoder(name))}
    return place(Adapter.read(folder / "one.safetensors"), networks, vocabulary())


def vocabulary() -> dict[str, int]:
    return CLIPTokenizer.from_pretrained(FOLDER / "authors_tokenizer").get_vocab()


def check_authors(name: str, folder: Path) -> None:
    network, encoder, data, about = unet(name), text_encoder(name), tensors(name), description(name)
    placed = place_authors(name, folder)
    assert [word.name for word in placed.words] == [
        word for word, _ in about["train_tokens"] if word[0] + word[-1] in ("[]", "<>")
    ]

    adapted = with_words(changed(encoder, placed, "text_encoder", 1), placed)
    hidden, pooled = encode(adapted, data)
    close(hidden[:, about["rows"], :: about["channels_step"]], data["hidden_1"])
    close(pooled[:, None], data["pooled_1"])
    for one in strengths(name, data):
        adapted = changed(network, placed, "prior", float(one))
        conditions = adapted.condition(pooled[:, None], hidden, data["clip_img"])
        close(adapted(data["x"], data["r"], conditions), data[f"out_{one}"])


def check_embedding(name: str) -> None:
    encoder, data, about = text_encoder(), tensors(name), description(name)
    placed = place(Adapter.read(file_of(name)), {"text_encoder": shapes(encoder)})
    (word,) = placed.words
    vectors = word.rows(encoder.get_input_embeddings().weight)
    ids = data["input_ids"].clone()
    ids[ids == -1] = torch.arange(encoder.config.vocab_size, encoder.config.vocab_size + len(vectors))
    ends = (ids == encoder.config.eos_token_id).int().argmax(dim=1)
    mask = (torch.arange(ids.shape[1])[None] <= ends[:, None]).long()
    hidden, pooled = encode(with_words(encoder, placed), {"input_ids": ids, "attention_mask": mask})
    close(hidden[:, about["rows"]], data["hidden"])
    close(pooled, data["pooled"])
