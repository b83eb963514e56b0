"""Recognises by keys and shapes which other model an adapter is for; errors name that model."""

import re
from collections.abc import Mapping, Sequence

from cascade.weights.recognise import recognise

# The model is the first one whose expression is found in a key.
NAMED: tuple[tuple[str, str], ...] = (
    ("Flux", r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d"),
    ("Stable Diffusion XL", r"^lora_te1_|^text_encoder_2\.|^clip_l$|add_embedding[._]linear|label_emb[._]0"),
    ("Wan", r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo]\b"),
    ("Würstchen v2", r"(^|[._])cond_mapper[._]"),
)
# Stable Diffusion's versions, by the width of the text embeddings that the UNet's cross-attention reads.
CROSS_ATTENTION = re.compile(r"attn2[._](processor[._])?to_[kv](_lora)?[._](lora_?down|down|lora_A|hada_w[12]_b)")
WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
STABLE_DIFFUSION = re.compile(
    r"(input|output|middle)_blocks?[._]\d|(down|up)_blocks[._]\d+[._](attentions|resnets)|mid_block[._]"
)
# Several models have such names.
TRANSFORMER = re.compile(r"(^|[._])transformer_blocks[._]\d")


def model(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The model that an adapter is for, such as "Stable Diffusion XL"; None: not known.

    Args:
        shapes: of its tensors, by key as stored.
    """
    for name, expression in NAMED:
        if any(re.search(expression, key) for key in shapes):
            return name
    widths = {shape[-1] for key, shape in shapes.items() if len(shape) == 2 and CROSS_ATTENTION.search(key)}
    if len(widths) == 1:
        return WIDTHS.get(widths.pop(), "Stable Diffusion")
    if any(STABLE_DIFFUSION.search(key) for key in shapes):
        return "Stable Diffusion"
    if any(TRANSFORMER.search(key) for key in shapes):
        return "a diffusion transformer, such as Stable Diffusion 3 or Qwen-Image"
    found = recognise(shapes)
    return None if found == "a LoRA" else found
