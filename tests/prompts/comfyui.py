"""What ComfyUI makes of prompts: see tests/fixtures/prompts/README.md."""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.conversion import convert
from cascade.prompts.embeddings import PICKLES, SUFFIX
from tests import fixture_data, packed

FOLDER = packed.folder("CASCADE_PROMPT_FIXTURES", Path(__file__).parent.parent / "fixtures" / "prompts")
SEED = int(os.environ.get("CASCADE_PROMPT_FIXTURES_SEED") or 0)
EMBEDDINGS = FOLDER / "embeddings"


def description(name: str) -> Any:
    """NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


PROMPTS: dict[str, dict[str, Any]] = description("prompts")
PAIRS: list[dict[str, Any]] = description("pairs")


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """NAME.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    return {key: fixture_data.weight(key, shape, SEED) for key, shape in description(name)["state_dict"].items()}


@cache
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")


@cache
def text_encoder() -> CLIPTextModelWithProjection:
    network = CLIPTextModelWithProjection(CLIPTextConfig(**description("text_encoder")["config"]))
    network.load_state_dict(weights("text_encoder"))
    return network.eval()


@cache
def stage_c() -> StableCascadeUNet:
    return fixture_data.unet("stage_c", description("stage_c")["config"], weights("stage_c"))


def width() -> int:
    return text_encoder().config.hidden_size


def file_of(name: str) -> Path:
    """The file of an embedding that a prompt uses."""
    found = [EMBEDDINGS / f"{name}{suffix}" for suffix in ("", SUFFIX, *PICKLES)]
    nested = [path for suffix in ("", SUFFIX, *PICKLES) for path in sorted(EMBEDDINGS.rglob(f"{name}{suffix}"))]
    return next(path for path in (*found, *nested) if path.is_file())


def converted(target: Path) -> Path:
    """A copy of the embeddings, in which pickles have been converted."""
    shutil.copytree(EMBEDDINGS, target)
    for path in [path for suffix in PICKLES for path in target.rglob(f"*{suffix}")]:
        convert(path, path.with_suffix(SUFFIX), width())
        path.unlink()
    return target


def widths(path: Path) -> set[int]:
    """Of a safetensors file's tensors."""
    return {tensor.shape[-1] for tensor in load_file(path).values()}


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0, equal_nan=True)
