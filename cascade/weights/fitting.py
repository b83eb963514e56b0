"""Whether tensors are those of a network, by their names and shapes; and configurations as older programs wrote them."""

from collections.abc import Mapping, Sequence
from typing import Any

# Checkpoints written by old transformers hold this buffer; today's networks make it themselves.
IGNORED_KEYS = ("embeddings.position_ids",)
# Counters of BatchNorm are of use to training with momentum None only; some files leave them out.
OPTIONAL_KEYS = ("num_batches_tracked",)

# Names in the configuration of a UNet when Stable Cascade was launched (diffusers 0.26), and what they became.
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
# Of these, the first value was for the way down, the second for the way up.
LAUNCH_PAIRS = {
    "blocks": ("down_num_layers_per_block", "up_num_layers_per_block"),
    "block_repeat": ("down_blocks_repeat_mappers", "up_blocks_repeat_mappers"),
}
BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}


def current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's configuration with the launch's names, such as ``c_hidden``, under today's; any other as it is.

    Raises:
        KeyError, TypeError, ValueError: a value with such a name is of another kind.
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
    """The first thing in which a file's tensors differ from a network's, as the end of a sentence that begins with the
    file; None if they fit.

    Args:
        expected, stored: shapes by key, of the network and of the file.
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
            return f" has a tensor {key}, which is none of its network's"
    return None
