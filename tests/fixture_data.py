"""Reference inputs, outputs and weights: see tests/fixtures/README.md."""

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cascade.networks.unet import StableCascadeUNet
from cascade.weights import making, single_file, variants

FOLDER = Path(os.environ.get("CASCADE_FIXTURES") or Path(__file__).parent / "fixtures")
SEED = int(os.environ.get("CASCADE_FIXTURES_SEED") or 0)


def description(name: str) -> dict[str, Any]:
    """NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """NAME.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    """The reference network's weights, under the authors' key names: a function of key, shape and seed."""
    return {key: weight(key, shape) for key, shape in description(name)["state_dict"].items()}


def weight(key: str, shape: Sequence[int], seed: int = SEED) -> Tensor:
    """One tensor of a reference network."""
    generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) & 0x7FFFFFFF) + seed)
    noise = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if key.endswith(("running_mean", "bias", "gamma", "beta", "gammas")):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(math.prod(shape[1:]))


def unet(name: str, config: dict[str, Any], weights: dict[str, Tensor]) -> StableCascadeUNet:
    """The authors' Stage B or C, "stage_b" or "stage_c", as ours: by their names of arguments and tensors."""
    down, up = config["blocks"]
    down_repeats, up_repeats = config["block_repeat"]
    res, time, attention = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
    stage_c = name == "stage_c"
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
        "dropout": 0.1,
    }
    if stage_c:
        names |= {
            "clip_text_in_channels": config["c_clip_text"],
            "clip_text_pooled_in_channels": config["c_clip_text_pooled"],
            "clip_image_in_channels": config["c_clip_img"],
            "switch_level": config["switch_level"],
        }
    else:
        names |= {
            "in_channels": 4,
            "out_channels": 4,
            "clip_text_pooled_in_channels": config["c_clip"],
            "effnet_in_channels": config["c_effnet"],
            "pixel_mapper_in_channels": config["c_pixels"],
            "timestep_conditioning_type": ["sca"],
        }
    state_dict = single_file.convert(weights)
    assert variants.component_of(state_dict) == ("prior" if stage_c else "decoder")
    return making.build(state_dict, StableCascadeUNet, names)
