"""The smallest training that still runs the real code: a configuration, and a folder of pictures with captions."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training import run

CONFIG = """
[model]
name = "Test"
license = "none"
prior = { steps = 2, guidance = 4.0, shift = 2.0, rescale = 0.7 }
decoder = { steps = 2, guidance = 1.0, shift = 1.0, rescale = 0.7 }
[data]
size = 128
other_sizes = [[192, 128]]
[tokenizer]
vocabulary = 700
[vqgan]
embed_dim = 16
bottleneck_blocks = 1
num_vq_embeddings = 8
scale_factor = 0.43
[text_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 77
projection_dim = 16
[image_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
image_size = 32
patch_size = 16
projection_dim = 16
[effnet]
stem_channels = 8
channels = [8, 8, 8, 8, 8, 8]
repeats = [1, 1, 1, 1, 1, 1]
expansions = [1, 2, 2, 2, 2, 2]
strides = [1, 2, 2, 2, 1, 2]
head_channels = 16
[previewer_network]
hidden = 16
[decoder]
in_channels = 4
out_channels = 4
patch_size = 2
conditioning_dim = 16
block_out_channels = [16, 16]
num_attention_heads = [0, 2]
down_num_layers_per_block = [1, 1]
up_num_layers_per_block = [1, 1]
down_blocks_repeat_mappers = [1, 1]
up_blocks_repeat_mappers = [1, 1]
block_types_per_layer = [
    ["SDCascadeResBlock", "SDCascadeTimestepBlock"],
    ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"],
]
clip_text_pooled_in_channels = 16
effnet_in_channels = 16
pixel_mapper_in_channels = 3
timestep_conditioning_type = ["sca"]
[prior]
conditioning_dim = 16
block_out_channels = [16, 16]
num_attention_heads = [2, 2]
down_num_layers_per_block = [1, 1]
up_num_layers_per_block = [1, 1]
clip_text_in_channels = 16
clip_text_pooled_in_channels = 16
clip_image_in_channels = 16
switch_level = [false]
[ip_adapter_network]
feature_dim = 16
num_tokens = 3
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
attention_head_dim = 8
conditioning_dim = 16
blocks = [0, 3]
block_channels = 16
[stage_a]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3 }
task = { crop = 64, latent_noise = 0.05 }
[clip]
options = { steps = 2, batch_size = 4, learning_rate = 1e-3 }
[vision]
options = { steps = 2, batch_size = 4, learning_rate = 1e-3 }
task = { naming = 1.0 }
[semantic]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3 }
[semantic.task]
weight = { kind = "p2", k = 0.01, floor = 0.1 }
pyramid = 0.75
semantic_noise = 0.1
preview_weight = 1.0
drop_semantic = 0.1
drop_text = 0.1
[stage_b]
options = { steps = 8, batch_size = 3, learning_rate = 1e-3 }
[stage_b.task]
other_scales = 0.5
weight = { kind = "adaptive" }
pyramid = 0.75
semantic_noise = 0.1
drop_semantic = 0.1
drop_text = 0.1
[stage_c]
options = { steps = 8, batch_size = 4, learning_rate = 1e-3 }
[stage_c.task]
weight = { kind = "p2" }
drop_text = 0.1
keep_image = 0.1
[previewer]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3 }
task = { semantic_noise = 0.1 }
[controlnet]
proj_blocks = [0, 3]
[controlnet_canny]
options = { steps = 8, batch_size = 2, learning_rate = 1e-3 }
[controlnet_canny.task]
weight = { kind = "p2" }
drop_text = 0.1
keep_image = 0.1
offset_noise = 0.0
[controlnet_inpainting]
options = { steps = 8, batch_size = 2, learning_rate = 1e-3 }
control = { inverted = 0.25 }
[controlnet_inpainting.task]
weight = { kind = "adaptive" }
drop_text = 0.1
keep_image = 0.1
offset_noise = 0.1
[ip_adapter]
options = { steps = 8, batch_size = 2, learning_rate = 1e-3 }
[ip_adapter.task]
weight = { kind = "p2" }
drop_text = 0.3
[distil_c]
options = { steps = 8, batch_size = 4, learning_rate = 1e-3 }
task = { rank = 2, paths = 12, substeps = 2, own = 0.5, drop_text = 0.3, keep_image = 0.5 }
[distil_b]
options = { steps = 8, batch_size = 3, learning_rate = 1e-3 }
task = { rank = 2, paths = 12, substeps = 2, own = 0.5, semantic_noise = 0.1 }
"""

# The second process's clock runs ten times as fast: by its own, it would save and stop at other steps than the first.
OTHER_CLOCK = """
import os, sys, time
if os.environ.get("RANK") == "1":
    clock, start = time.time, time.time()
    time.time = lambda: start + 10 * (clock() - start)
"""
OWN_CLOCK = f"{OTHER_CLOCK}from training.run import main\nsys.exit(main())\n"

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "black": (0, 0, 0)}


def write_pictures(folder: Path, count: int, size: int = 96) -> Path:
    """Squares of four colours at random places, each with its caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for index in range(count):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.full((size, size, 3), 255, np.uint8)
        top, left = draws.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text(f"a {name} square\n")
    return folder


def write_config(folder: Path, changes: str = "") -> Path:
    """The configuration's file, with changes, a line each: ``table.name = value``, or ``- table.name`` to take it out.

    A name can have a point itself: ``stage_a.options.steps``.
    """
    tables = tomllib.loads(CONFIG)
    for line in filter(None, map(str.strip, changes.splitlines())):
        name, _, value = line.removeprefix("- ").partition(" = ")
        *path, last = name.split(".")
        table = tables
        for key in path:
            table = table.setdefault(key, {})
        if line.startswith("- "):
            del table[last]
        else:
            table[last] = tomllib.loads(f"value = {value}")["value"]
    file = folder / "config.toml"
    file.write_text("\n".join(f"[{name}]\n{body(table)}" for name, table in tables.items()))
    return file


def body(table: dict[str, Any]) -> str:
    """A table's lines in TOML; tables in it are written inline."""
    return "\n".join(f"{name} = {written(value)}" for name, value in table.items()) + "\n"


def written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {written(one)}" for name, one in value.items()) + "}"
    return json.dumps(value)


def train(config: Path, stage: str, data: Path, output: Path, *options: str) -> int:
    """``python -m training.run`` in this process; returns the exit code."""
    return run.main([str(config), stage, "--data", str(data), "--output", str(output), *options])
