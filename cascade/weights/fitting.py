"""Compares a file's tensors with a network by name and shape, and reads configurations of older diffusers versions."""

from collections.abc import Mapping, Sequence
from typing import Any

# Checkpoints of old transformers versions hold this buffer. Current versions compute it.
IGNORED_KEYS = ("embeddings.position_ids",)
# BatchNorm uses these counters only in training with momentum None, so some files lack them.
OPTIONAL_KEYS = ("num_batches_tracked",)

# Names in a UNet's configuration when Stable Cascade was launched (diffusers 0.26), and their current names.
LAUNCH_NAMES = {
    "c_in": "in_channels",
    "c_out": "out_channels",
    "c_r": "timestep_ratio_embedding_dim",
    "c_cond": "conditioning_dim",
    "c_hidden": "block_out_channels",
    "nhead": "num_attention_heads",
    "c_clip_text": "clip_text_in_channels",
    "c_clip_text_pooled": "clip_text_pooled_in_channels",
    "c_clip_img": "clip_image_in_channels",
    "c_clip_seq": "clip_seq",
    "c_effnet": "effnet_in_channels",
    "c_pixels": "pixel_mapper_in_channels",
    "t_conds": "timestep_conditioning_type",
}
# These held a pair: the value of the down blocks, then that of the up blocks.
LAUNCH_PAIRS = {
    "blocks": ("down_num_layers_per_block", "up_num_layers_per_block"),
    "block_repeat": ("down_blocks_repeat_mappers", "up_blocks_repeat_mappers"),
}
BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


def current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the launch's names in a UNet's configuration, such as ``c_hidden``, to the current ones. Others stay.

    Raises:
        KeyError, TypeError, ValueError: a value under a launch name has the wrong type.
    """
    if "c_hidden" not in config:
        return dict(config)
    result = {LAUNCH_NAMES.get(name, name): value for name, value in config.items()}
    result["num_attention_heads"] = [max(heads, 0) for heads in result["num_attention_heads"]]  # -1 was no attention
    for name, (down, up) in LAUNCH_PAIRS.items():
        if name in result:
            result[down], result[up] = result.pop(name)
    if "level_config" in result:
        result["block_types_per_layer"] = [[BLOCKS[letter] for letter in level] for level in result.pop("level_config")]
    return result


def misfit(expected: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]]) -> str | None:
    """The first difference between a file's tensors and a network's; None if they fit.

    Args:
        expected, stored: shapes by key, of the network and of the file.

    Returns:
        The end of a sentence that begins with the file's name.
    """
    for key, shape in expected.items():
        if key not in stored:
            if key.endswith(OPTIONAL_KEYS):
                continue
            return f" has no tensor {key}"
        if tuple(stored[key]) != tuple(shape):
            return f": {key} has the shape {tuple(stored[key])} instead of {tuple(shape)}"
    for key in stored:
        if key not in expected and not key.endswith(IGNORED_KEYS):
            return f" has a tensor {key}, which its network does not have"
    return None
