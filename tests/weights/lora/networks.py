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
from cascade.weights import single_file
from cascade.weights.lora import Placed, merged
from cascade.weights.lora.words import TABLE
from tests.fixture_data import weight

FOLDER = Path(os.environ.get("CASCADE_LORA_FIXTURES") or Path(__file__).parents[2] / "fixtures" / "lora")
SEED = int(os.environ.get("CASCADE_LORA_FIXTURES_SEED") or 0)


def description(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def unet(name: str) -> StableCascadeUNet:
    """The network of NAME.json, with its weights. Not to be changed."""
    content = description(name)
    config = content["config"]
    (down, up), (down_repeats, up_repeats) = config["blocks"], config["block_repeat"]
    res, time, attention = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
    names = {
        "timestep_ratio_embedding_dim": config["c_r"],
        "patch_size": config["patch_size"],
        "conditioning_dim": config["c_cond"],
        "block_out_channels": config["c_hidden"],
        "num_attention_heads": config["nhead"],
        "down_num_layers_per_block": down,
        "up_num_layers_per_block": up,
        "down_blocks_repeat_mappers": down_repeats,
        "up_blocks_repeat_mappers": up_repeats,
        "block_types_per_layer": [(res, time, attention) if heads > 0 else (res, time) for heads in config["nhead"]],
        "clip_seq": config["c_clip_seq"],
        "dropout": 0.0,
    }
    if "c_effnet" in config:
        names |= {
            "in_channels": 4,
            "out_channels": 4,
            "clip_text_pooled_in_channels": config["c_clip"],
            "effnet_in_channels": config["c_effnet"],
            "pixel_mapper_in_channels": config["c_pixels"],
            "timestep_conditioning_type": ["sca"],
        }
    else:
        names |= {
            "clip_text_in_channels": config["c_clip_text"],
            "clip_text_pooled_in_channels": config["c_clip_text_pooled"],
            "clip_image_in_channels": config["c_clip_img"],
            "switch_level": config["switch_level"],
        }
    weights = {key: weight(key, shape, SEED) for key, shape in content["state_dict"].items()}
    return single_file.build(single_file.convert(weights), StableCascadeUNet, names)


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
