"""The small networks of the adapters' reference data: see tests/fixtures/lora/README.md."""

import copy
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cascade.networks.unet import StableCascadeUNet
from cascade.weights.lora import Placed, merged
from cascade.weights.lora.words import TABLE
from tests import fixture_data, packed
from tests.fixture_data import weight

FOLDER = packed.folder("CASCADE_LORA_FIXTURES", Path(__file__).parents[2] / "fixtures" / "lora")
SEED = int(os.environ.get("CASCADE_LORA_FIXTURES_SEED") or 0)


def description(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def unet(name: str) -> StableCascadeUNet:
    """The network of NAME.json, with its weights. Not to be changed."""
    content = description(name)
    weights = {key: weight(key, shape, SEED) for key, shape in content["state_dict"].items()}
    return fixture_data.unet("stage_b" if "c_effnet" in content["config"] else "stage_c", content["config"], weights)


@cache
def text_encoder(name: str = "text_encoder") -> CLIPTextModelWithProjection:
    """The text encoder of NAME.json. Not to be changed."""
    content = description(name)
    network = CLIPTextModelWithProjection(CLIPTextConfig(**content.get("text_config", content["config"]))).eval()
    buffers = {key for key, _ in network.named_buffers()}
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items() if key not in buffers}
    network.load_state_dict({key: weight(key, shape, SEED) for key, shape in shapes.items()}, strict=False)
    return network


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def changed(network: nn.Module, placed: Placed, component: str, strength: float) -> nn.Module:
    """A copy of a network with an adapter."""
    state = network.state_dict()
    for name, changes in placed.changes.get(component, {}).items():
        state[name] = merged(state[name], [(change, strength) for change in changes])
    copied = copy.deepcopy(network)
    copied.load_state_dict(state)
    return copied


def with_words(network: CLIPTextModelWithProjection, placed: Placed) -> CLIPTextModelWithProjection:
    """A copy of a text encoder whose table of words ends in learned ones."""
    table = network.state_dict()[TABLE]
    copied = copy.deepcopy(network)
    rows = torch.cat([table, *(word.rows(table) for word in placed.words)])
    copied.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(rows)
    return copied


def encode(network: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden states before the final norm, (B, 77, D), and the pooled projection (B, P)."""
    output = network(given["input_ids"], attention_mask=given["attention_mask"], output_hidden_states=True)
    return output.hidden_states[-1], output.text_embeds
