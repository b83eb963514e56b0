"""Recognises other models' files by the names and shapes of their tensors, to name them in errors."""

from collections.abc import Mapping, Sequence

STABLE_DIFFUSION = "Stable Diffusion"
# By the width of the text embeddings that cross-attention reads.
STABLE_DIFFUSION_VERSIONS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}
CROSS_ATTENTION = "attn2.to_k.weight"

# (model, pieces). A file is the first model whose pieces all occur in its keys.
MODELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", ("lora",)),
    ("a LoRA", ("hada_w1",)),
    ("a LoRA", ("lokr_w",)),
    ("an IP-Adapter", ("ip_adapter.",)),
    ("a ControlNet of Stable Diffusion", ("control_model.",)),
    ("a ControlNet of Stable Diffusion", ("controlnet_cond_embedding.",)),
    ("Flux", ("double_blocks.0.img_attn.", "single_blocks.0.")),
    ("Flux", ("single_transformer_blocks.0.",)),
    ("Stable Diffusion 3", ("joint_blocks.0.",)),
    ("Stable Diffusion 3", ("transformer_blocks.0.attn.add_k_proj.",)),
    ("PixArt", ("transformer_blocks.0.scale_shift_table", "adaln_single.")),
    ("Würstchen v2", ("cond_mapper.0.", "projection.")),
    ("Stable Diffusion XL", ("input_blocks.0.0.", "label_emb.0.0.")),
    ("Stable Diffusion XL", ("conv_in.", "add_embedding.linear_1.")),
    (STABLE_DIFFUSION, ("input_blocks.0.0.", "time_embed.0.")),
    (STABLE_DIFFUSION, ("conv_in.", "time_embedding.linear_1.")),
    ("an autoencoder of Stable Diffusion", ("encoder.down_blocks.0.resnets.0.", "decoder.up_blocks.0.resnets.0.")),
    ("an autoencoder of Stable Diffusion", ("encoder.down.0.block.0.", "decoder.up.0.block.0.")),
    ("a T5 text encoder", ("block.0.layer.0.SelfAttention.",)),
    ("a text encoder with OpenCLIP's names", ("transformer.resblocks.0.attn.", "ln_final.")),
    ("a textual inversion", ("emb_params",)),
)


def recognise(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The model that a file holds, such as "Stable Diffusion XL"; None if it is unknown.

    Args:
        shapes: the shapes of the file's tensors, by key.
    """
    for name, pieces in MODELS:
        if not all(any(piece in key for key in shapes) for piece in pieces):
            continue
        if name == STABLE_DIFFUSION:
            widths = {shape[-1] for key, shape in shapes.items() if key.endswith(CROSS_ATTENTION)}
            return STABLE_DIFFUSION_VERSIONS.get(widths.pop(), name) if len(widths) == 1 else name
        return name
    return None
