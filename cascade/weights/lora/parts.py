"""The keys of adapters' tensors: a prefix for the network, the name of a layer, and a suffix for the part of the adapter.

    lora_unet_  down_blocks_0_2_attention_attn_to_q  .lora_down.weight        kohya, ComfyUI
    prior.      down_blocks.0.2.attention.to_q       .lora_A.weight           OneTrainer for diffusers

`split` splits a key; `layers` finds the layer of that name.
"""

from typing import NamedTuple

# The networks that a prefix may mean. Stages B and C have the same prefixes in most programs; shapes tell them apart.
UNETS = ("prior", "decoder")
TEXT = ("text_encoder",)
# Longer ones first where one begins with another.
PREFIXES: dict[str, tuple[str, ...]] = {
    "lora_prior_unet_": UNETS,
    "lora_prior_te_": TEXT,
    "lora_unet_": UNETS,
    "lora_te2_": TEXT,  # ComfyUI's for the projection; Stable Diffusion XL's second text encoder is the same network
    "lora_te_": TEXT,
    "lycoris_": (*UNETS, *TEXT),
    "base_model.model.": (*UNETS, *TEXT),
    "model.diffusion_model.": UNETS,
    "diffusion_model.": UNETS,
    "text_encoders.clip_g.transformer.": TEXT,
    "text_encoder.": TEXT,
    "clip_g.": TEXT,
    "unet.": UNETS,
    "prior.": ("prior",),
    "decoder.": ("decoder",),
    "": UNETS,
}

# The suffixes of the parts, and their names in `algorithms`.
SUFFIXES: dict[str, str] = {
    "lora_up.weight": "up",
    "lora_up": "up",
    "lora.up.weight": "up",
    "lora_linear_layer.up.weight": "up",
    "lora_B.weight": "up",
    "lora_B": "up",
    "lora_down.weight": "down",
    "lora_down": "down",
    "lora.down.weight": "down",
    "lora_linear_layer.down.weight": "down",
    "lora_A.weight": "down",
    "lora_A": "down",
    "lora_mid.weight": "mid",
    "lora_B.bias": "up_bias",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude_out",
    "lora_magnitude_vector.weight": "magnitude_out",
    **{f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr_w1": "k1",
    "lokr_w1_a": "k1_a",
    "lokr_w1_b": "k1_b",
    "lokr_w2": "k2",
    "lokr_w2_a": "k2_a",
    "lokr_w2_b": "k2_b",
    "lokr_t2": "k2_t",
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    "oft_blocks": "oft_blocks",
    "rescale": "rescale",
    "oft_R.weight": "oft_R",
    "ia3_l": "ia3_l",
    "on_input": "on_input",
    "diff": "diff",
    "w_norm": "diff",
    "set_weight": "set",
    "weight": "weight",
    "diff_b": "bias_diff",
    "b_norm": "bias_diff",
    "bias": "bias_set",
}
# Suffixes that are joined to the layer's name by "_": by OneTrainer from April 2025 to July 2026; by old diffusers.
JOINED = {
    **{suffix: name for suffix, name in SUFFIXES.items() if suffix.startswith(("hada_", "lokr_", "dora_scale"))},
    "lora.up.weight": "up",
    "lora.down.weight": "down",
}
# PEFT puts these between a layer and its parts: the names of the adapter, and of the layer that it wraps.
PEFT_MIDDLES = (".default", ".base_layer", ".modules_to_save")


class Part(NamedTuple):
    """A tensor's key, split into its parts.

    Attributes:
        prefix: one of `PREFIXES`.
        layer: as the file spells it.
        name: one of the values of `SUFFIXES`.
        joined: whether the suffix is joined by "_".
    """

    prefix: str
    layer: str
    name: str
    joined: bool = False


def split(key: str) -> Part | None:
    """The parts of a key; None if it has none of the suffixes."""
    prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
    rest = key.removeprefix(prefix)
    for middle in PEFT_MIDDLES:
        rest = f"{rest}.".replace(f"{middle}.", ".").removesuffix(".")
    for suffix, name in JOINED.items():
        if rest.endswith(f"_{suffix}"):
            return Part(prefix, rest.removesuffix(f"_{suffix}"), name, joined=True)
    # The longest matching suffix is the right one, because others end in `weight`, too.
    for cut in (place for place, sign in enumerate(rest) if sign == "."):
        if rest[cut + 1 :] in SUFFIXES:
            return Part(prefix, rest[:cut], SUFFIXES[rest[cut + 1 :]])
    return None
