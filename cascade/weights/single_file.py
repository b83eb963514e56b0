"""Reads checkpoints that are not in the standard folder form: the authors' single files and ComfyUI's.

A file may hold one network or several under prefixes; key names may be the authors' or diffusers'. `read` answers with
one state dict a component, in the key names of `cascade.networks`; `build` makes the network of one.
Mapping of the authors' names: fused attention projections are split, Stage B's `clip_mapper` and Stage A's `codebook`
are renamed, all else is the same. Only safetensors files are opened.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from cascade.networks.controlnet import PUBLISHED_BLOCKS, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# Longest first. Keys of one group make one component; the bare prefix is a file of one network.
PREFIXES = {
    "model.diffusion_model.": "unet",
    "vae.encoder.": "encoder",
    "vae.previewer.": "previewer",
    "vae.": "vae",
    "text_encoder.clip_g.transformer.": "text_encoder",
    "text_encoder.clip_g.": "text_encoder",
    "text_encoder.": "text_encoder",
    "clip_l_vision.": "image_encoder",
    "encoder.": "encoder",
    "previewer.": "previewer",
    "": "bare",
}

# A component is the first whose key is there. Both UNets have a `clf`, so these look for what only one of them has.
SIGNATURES = {
    "clip_txt_mapper.weight": "prior",
    "effnet_mapper.0.weight": "decoder",
    "in_block.1.weight": "vqgan",
    "mapper.0.weight": "effnet",
    "blocks.24.weight": "previewer",
    "projections.0.0.weight": "controlnet",
    "text_model.final_layer_norm.weight": "text_encoder",
    "vision_model.post_layernorm.weight": "image_encoder",
}


@dataclass(frozen=True)
class Variant:
    """A published network. `component` says what it does; `name` tells sizes apart, by the `width` of `width_key`."""

    name: str
    component: str
    network: type[ModelMixin]
    width_key: str
    width: int
    config: dict[str, Any]


_RES_TIME = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
_RES_TIME_ATTN = (*_RES_TIME, "SDCascadeAttnBlock")
_PRIOR = {
    "clip_text_in_channels": 1280,
    "clip_text_pooled_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
}
_DECODER = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "conditioning_dim": 1280,
    "block_types_per_layer": (_RES_TIME, _RES_TIME, _RES_TIME_ATTN, _RES_TIME_ATTN),
    "down_blocks_repeat_mappers": (1, 1, 1, 1),
    "effnet_in_channels": 16,
    "pixel_mapper_in_channels": 3,
    "dropout": (0.0, 0.0, 0.1, 0.1),
    "timestep_conditioning_type": ("sca",),
}
_UNET_WIDTH = "down_blocks.1.0.depthwise.weight"

# Sizes: Stability-AI/StableCascade train/train_c.py and train/train_b.py.
VARIANTS = (
    Variant("prior", "prior", StableCascadeUNet, _UNET_WIDTH, 2048, _PRIOR),
    Variant(
        "prior_lite",
        "prior",
        StableCascadeUNet,
        _UNET_WIDTH,
        1536,
        {
            **_PRIOR,
            "conditioning_dim": 1536,
            "block_out_channels": (1536, 1536),
            "num_attention_heads": (24, 24),
            "down_num_layers_per_block": (4, 12),
            "up_num_layers_per_block": (12, 4),
        },
    ),
    Variant(
        "decoder",
        "decoder",
        StableCascadeUNet,
        _UNET_WIDTH,
        640,
        {
            **_DECODER,
            "block_out_channels": (320, 640, 1280, 1280),
            "num_attention_heads": (0, 0, 20, 20),
            "down_num_layers_per_block": (2, 6, 28, 6),
            "up_num_layers_per_block": (6, 28, 6, 2),
            "up_blocks_repeat_mappers": (3, 3, 2, 2),
        },
    ),
    Variant(
        "decoder_lite",
        "decoder",
        StableCascadeUNet,
        _UNET_WIDTH,
        576,
        {
            **_DECODER,
            "block_out_channels": (320, 576, 1152, 1152),
            "num_attention_heads": (0, 9, 18, 18),
            "down_num_layers_per_block": (2, 4, 14, 4),
            "up_num_layers_per_block": (4, 14, 4, 2),
            "up_blocks_repeat_mappers": (2, 2, 2, 2),
        },
    ),
    # The authors decode with 0.43; the diffusers folder of the same weights says 0.3764, its class's default.
    Variant("vqgan", "vqgan", StageA, "in_block.1.weight", 192, {"scale_factor": 0.43}),
    Variant("effnet", "effnet", SemanticEncoder, "mapper.0.weight", 16, {}),
    Variant("previewer", "previewer", Previewer, "blocks.0.weight", 512, {}),
)


def read(path: Path | str) -> dict[str, StateDict]:
    """Reads a safetensors file into {component: state dict}, tensors as stored, on the CPU.

    Components: prior, decoder, vqgan, effnet, previewer, controlnet; of combined files also text_encoder and
    image_encoder, in transformers' key names. Raises ValueError for another kind of file and for tensors of no known
    component.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path.name} is not a safetensors file; only *.safetensors files are opened.")
    try:
        return split(load_file(path))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def split(state_dict: StateDict) -> dict[str, StateDict]:
    """Divides a file's tensors into {component: state dict}, with prefixes taken off and keys in our names.

    Raises ValueError for tensors of no known component.
    """
    groups: dict[str, StateDict] = {}
    for key, tensor in state_dict.items():
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        groups.setdefault(PREFIXES[prefix], {})[key.removeprefix(prefix)] = tensor
    converted = [convert(group) for group in groups.values()]
    return {component_of(group): group for group in converted}


def convert(state_dict: StateDict) -> StateDict:
    """One network's tensors under our key names, from the authors', ComfyUI's or already ours.

    Split tensors are copies, so that the result can be saved.
    """
    result: StateDict = {}
    for key, tensor in state_dict.items():
        key = key.replace("attention.attn.", "attention.")
        if ".attention.in_proj_" in key:
            stem, kind = key.rsplit("in_proj_", 1)
            for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                result[f"{stem}{name}.{kind}"] = part.clone()
            continue
        if key == "text_projection":  # OpenCLIP's parameter, which transformers holds as a Linear
            key, tensor = "text_projection.weight", tensor.t().contiguous()
        if key == "logit_scale":  # of CLIP's training objective; no network here has it
            continue
        key = key.replace(".attention.out_proj.", ".attention.to_out.0.")
        key = key.replace("clip_mapper.", "clip_txt_pooled_mapper.")
        result[key.replace("vquantizer.codebook.", "vquantizer.embedding.")] = tensor
    return result


def component_of(state_dict: StateDict) -> str:
    """Which component a converted state dict is. Raises ValueError if it is none."""
    for key, component in SIGNATURES.items():
        if key in state_dict:
            return component
    some = ", ".join(sorted(state_dict)[:3])
    raise ValueError(f"tensors such as {some} belong to no known component; known: {', '.join(SIGNATURES.values())}.")


def variant_of(state_dict: StateDict) -> Variant:
    """Which published network a converted state dict is. Raises ValueError if it is none."""
    component = component_of(state_dict)
    variants = [variant for variant in VARIANTS if variant.component == component]
    if not variants:
        raise ValueError(f"{component} has no variants that its width would tell apart.")
    key = variants[0].width_key
    if key not in state_dict:
        raise ValueError(f"{component} has no tensor {key}; its variant cannot be told.")
    width = state_dict[key].shape[0]
    for variant in variants:
        if variant.width == width:
            return variant
    published = {variant.name: variant.width for variant in variants}
    raise ValueError(f"{component} has width {width}; published: {published}.")


def controlnet_config(
    shapes: Mapping[str, Sequence[int]], proj_blocks: Sequence[int] = PUBLISHED_BLOCKS
) -> dict[str, Any]:
    """`ControlNet`'s configuration, from the shapes of a file's tensors by key.

    proj_blocks: which ResBlocks get the residuals. No file says so; the default is that of the published networks.
    Raises ValueError for tensors of no ControlNet, and if the number of projections is not that of `proj_blocks`.
    """
    if "backbone.0.0.weight" in shapes:
        mode, stem = "effnet", "backbone.0.0.weight"
    elif "backbone.0.weight" in shapes:
        mode, stem = "large" if "backbone.10.blocks.0.weight" in shapes else "simple", "backbone.0.weight"
    else:
        raise ValueError("The tensors are no ControlNet's: neither backbone.0.0.weight nor backbone.0.weight is there.")
    projections = [key for key in shapes if key.startswith("projections.") and key.endswith(".2.weight")]
    if len(projections) != len(proj_blocks):
        raise ValueError(f"The ControlNet has {len(projections)} projections, for ResBlocks {tuple(proj_blocks)}.")
    for key in (stem, projections[0]):
        if len(shapes[key]) != 4:
            raise ValueError(f"The ControlNet's {key} has the shape {tuple(shapes[key])}; it must have 4 dimensions.")
    return {
        "in_channels": shapes[stem][1],
        "out_channels": shapes[projections[0]][0],
        "proj_blocks": tuple(proj_blocks),
        "bottleneck_mode": mode,
    }


def build(
    state_dict: StateDict, network: type[ModelMixin] | None = None, config: dict[str, Any] | None = None
) -> ModelMixin:
    """The network of a converted state dict, in eval mode, around the very tensors given (their dtype and device).

    network, config: class and configuration; None finds the published variant, or what kind of ControlNet it is.
    Raises ValueError for missing or surplus keys and for shapes that do not fit.
    """
    if network is None and component_of(state_dict) == "controlnet":
        network = ControlNet
        config = controlnet_config({key: tensor.shape for key, tensor in state_dict.items()})
    elif network is None:
        variant = variant_of(state_dict)
        network, config = variant.network, variant.config
    with torch.device("meta"):
        model = network(**(config or {}))
    # Counters of BatchNorm are of use to training with momentum None only; some files leave them out.
    counters = {k: torch.tensor(0) for k in model.state_dict() if k.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**counters, **state_dict}, assign=True)
    except RuntimeError as error:
        raise ValueError(f"The tensors do not fit {network.__name__}: {error}") from error
    logger.info("built %s with %d tensors", network.__name__, len(state_dict))
    return model.eval()
