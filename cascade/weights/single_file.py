"""Checkpoints of other programs: splits a file into networks, and converts names and precision.

A file holds one network, or several under prefixes, in names of the authors, ComfyUI, kohya or diffusers. `split` finds a
network by a tensor that no other network has. The text before that tensor's name is the prefix. `split` returns one state
dict per component, in the names of `cascade.networks`. It needs only names and shapes, so tensors on the meta device serve
to inspect a file before it is read.

The authors' names are `cascade.networks`' with three exceptions: fused attention projections are split, and Stage B's
`clip_mapper` and Stage A's `codebook` are renamed. Weights in 8-bit floating point are multiplied by their scales, if they
have any, and become bfloat16.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cascade.networks.base import Network, without_values
from cascade.networks.clip import TextTower, VisionTower
from cascade.networks.controlnet import PUBLISHED_BLOCKS
from cascade.networks.effnet import IMAGENET_MEAN, IMAGENET_STD, SemanticEncoder
from cascade.networks.eight_bits import EightBits
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.weights.fitting import OPTIONAL_KEYS, misfit
from cascade.weights.recognise import recognise

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# A tensor's name in all programs -> the only component that has it. Both UNets have a `clf`, so these are other tensors.
SIGNATURES = {
    "clip_txt_mapper.weight": "prior",
    "effnet_mapper.0.weight": "decoder",
    "in_block.1.weight": "vqgan",
    "mapper.0.weight": "effnet",
    "blocks.24.weight": "previewer",
    "projections.0.0.weight": "controlnet",
    "image_proj.latents": "ip_adapter",
    "text_model.final_layer_norm.weight": "text_encoder",
    "vision_model.post_layernorm.weight": "image_encoder",
}
# Names for errors.
TITLES = {
    "prior": "Stage C (prior)",
    "decoder": "Stage B (decoder)",
    "vqgan": "Stage A (vqgan)",
    "effnet": "the semantic encoder (effnet)",
    "previewer": "the previewer",
    "controlnet": "a ControlNet of Stable Cascade",
    "ip_adapter": "an IP-Adapter",
    "text_encoder": "a text encoder",
    "image_encoder": "an image encoder",
}
# Tensors of ComfyUI's files that no network needs, by the last part of their names: OpenCLIP's scale, which only CLIP's
# training uses; marks of 8-bit files; scales of 8-bit activations, which no network here uses.
SURPLUS = ("logit_scale", "scaled_fp8", "scale_input", "input_scale", "comfy_quant")
# The scale of a tensor `x.weight` is `x.` and one of these.
SCALES = ("scale_weight", "weight_scale")
# ComfyUI's semantic encoder stores the normalisation of pixels as tensors. Here, it is part of the network.
NORMALISATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Variant:
    """A published network.

    Attributes:
        name: the component, with "_lite" for the smaller size.
        component: what it is used as.
        network: its class.
        width_key, width: the tensor whose first dimension tells the sizes apart, and that dimension.
        config: the configuration, where it differs from the class's defaults.
    """

    name: str
    component: str
    network: type[nn.Module]
    width_key: str
    width: int
    config: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name in errors, such as "the lite Stage C (prior)"."""
        title = TITLES[self.component]
        sizes = [variant for variant in VARIANTS if variant.component == self.component]
        return title if len(sizes) == 1 else f"the {'lite' if self.name.endswith('_lite') else 'full'} {title}"


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
_TEXT_ENCODER = {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "vocab_size": 49408,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
_IMAGE_ENCODER = {  # openai/clip-vit-large-patch14
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
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
    # The authors decode with 0.43. The diffusers folder of the same weights has 0.3764, its class's default.
    Variant("vqgan", "vqgan", StageA, "in_block.1.weight", 192, {"scale_factor": 0.43}),
    Variant("effnet", "effnet", SemanticEncoder, "mapper.0.weight", 16, {}),
    Variant("previewer", "previewer", Previewer, "blocks.0.weight", 512, {}),
    Variant(
        "text_encoder",
        "text_encoder",
        TextTower,
        "text_model.final_layer_norm.weight",
        1280,
        _TEXT_ENCODER,
    ),
    Variant(
        "image_encoder",
        "image_encoder",
        VisionTower,
        "vision_model.post_layernorm.weight",
        1024,
        _IMAGE_ENCODER,
    ),
)


def split(state_dict: Mapping[str, Tensor], only: str | None = None) -> dict[str, StateDict]:
    """Split a file's tensors by component, without prefixes and in our names.

    Args:
        state_dict: the file's tensors, on any device including "meta". Tensors that belong to no component are dropped and
            logged.
        only: a component of `SIGNATURES`; None: all.

    Raises:
        ValueError: the file holds no component, or one twice. The sentence names the file's model, if it is known.
    """
    prefixes: dict[str, str] = {}
    for key in state_dict:
        for signature, component in SIGNATURES.items():
            prefix = key.removesuffix(signature)
            if prefix != key and (not prefix or prefix.endswith(".")):
                if component in prefixes.values():
                    other = next(prefix for prefix, found in prefixes.items() if found == component)
                    raise ValueError(f"it holds {TITLES[component]} twice, under {other!r} and under {prefix!r}.")
                prefixes[prefix] = component
    # Other models' files may hold text and image encoders, too.
    if not set(prefixes.values()) - {"text_encoder", "image_encoder"}:
        what = recognise({key: tensor.shape for key, tensor in state_dict.items()})
        if what is not None:
            raise ValueError(f"it is {what}, and nothing of Stable Cascade.")
    if not prefixes:
        some = ", ".join(sorted(state_dict)[:3]) or "none at all"
        raise ValueError(f"its tensors ({some}) belong to none of Stable Cascade's networks.")
    groups: dict[str, StateDict] = {component: {} for component in prefixes.values()}
    strangers = []
    for key, tensor in state_dict.items():
        fitting = [prefix for prefix in prefixes if key.startswith(prefix)]
        if fitting:
            prefix = max(fitting, key=len)
            groups[prefixes[prefix]][key.removeprefix(prefix)] = tensor
        elif _is_projection(key, prefixes):
            groups["text_encoder"][key[key.rindex("text_projection") :]] = tensor
        elif key.rpartition(".")[2] not in SURPLUS:
            strangers.append(key)
    if strangers and only is None:
        logger.warning("%d tensors belong to no network and are ignored: %s ...", len(strangers), strangers[0])
    return {component: convert(group) for component, group in groups.items() if only in (None, component)}


def _is_projection(key: str, prefixes: Mapping[str, str]) -> bool:
    """Whether a tensor is the text encoder's projection, which ComfyUI stores outside of the text encoder's prefix."""
    above, found, _ = key.partition("text_projection")
    return bool(found) and any(
        prefix.startswith(above) for prefix, component in prefixes.items() if component == "text_encoder"
    )


def convert(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert one network's tensors from the authors' or ComfyUI's names to ours. Tensors in our names stay.

    Split tensors are copies, so that the result can be saved. 8-bit floating point becomes bfloat16.

    Raises:
        ValueError: a scale fits no tensor, fused projections cannot be split, or ComfyUI's normalisation of pixels differs
            from the network's.
    """
    result: StateDict = {}
    for key, tensor in _in_sixteen_bits(state_dict).items():
        key = key.replace("attention.attn.", "attention.")
        if key in NORMALISATION:
            _check_normalisation(key, tensor)
            continue
        if ".attention.in_proj_" in key:
            stem, kind = key.rsplit("in_proj_", 1)
            if tensor.ndim == 0 or len(tensor) % 3:
                raise ValueError(
                    f"{key} has the shape {tuple(tensor.shape)}; its rows must be those of three projections."
                )
            for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                result[f"{stem}{name}.{kind}"] = part.clone()
            continue
        if key == "text_projection":  # a parameter in OpenCLIP, a Linear in transformers
            if tensor.ndim != 2:
                raise ValueError(f"{key} has the shape {tuple(tensor.shape)}; it must have 2 dimensions.")
            key, tensor = "text_projection.weight", tensor.t().contiguous()
        key = key.replace(".attention.out_proj.", ".attention.to_out.0.")
        key = key.replace("clip_mapper.", "clip_txt_pooled_mapper.")
        result[key.replace("vquantizer.codebook.", "vquantizer.embedding.")] = tensor
    return result


def _in_sixteen_bits(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert 8-bit numbers with a scale, and 8-bit floating point, to bfloat16. Drop scales and other surplus tensors."""
    scales = {key: tensor for key, tensor in state_dict.items() if key.rpartition(".")[2] in SCALES}
    result: StateDict = {}
    for key, tensor in state_dict.items():
        stem, _, name = key.rpartition(".")
        if key in scales or name in SURPLUS:
            continue
        scale = next((scales[f"{stem}.{one}"] for one in SCALES if f"{stem}.{one}" in scales), None)
        if name == "weight" and scale is not None:
            tensor = _scaled(key, tensor, scale)
        elif tensor.dtype in EIGHT_BITS:
            tensor = tensor.to(torch.bfloat16)
        result[key] = tensor
    return result


def _scaled(key: str, tensor: Tensor, scale: Tensor) -> Tensor:
    if tensor.dtype == torch.int8 and tensor.ndim == scale.ndim == 2:  # one per group of a row, or one per row
        groups = scale.shape[1]
        if len(scale) != len(tensor) or not groups or tensor.shape[1] % groups:
            raise ValueError(f"{key} has scales of the shape {tuple(scale.shape)}; its own is {tuple(tensor.shape)}.")
        return EightBits(tensor, scale).restored(torch.bfloat16)
    if tensor.dtype not in EIGHT_BITS:
        raise ValueError(
            f"{key} has a scale, but is stored as {tensor.dtype}, not in 8-bit floating point, nor as int8 with a scale "
            "for each group of a row."
        )
    if tensor.ndim and scale.numel() == len(tensor):  # one per row
        scale = scale.reshape(-1, *[1] * (tensor.ndim - 1))
    elif scale.numel() != 1:
        raise ValueError(f"{key} has {scale.numel()} scales; it must have one in all, or one per row.")
    return (tensor.float() * scale.float().reshape(scale.shape or ())).to(torch.bfloat16)


def _check_normalisation(key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    told = tensor.float().flatten().tolist()
    if len(told) != 3 or any(abs(one - ours) > 0.01 for one, ours in zip(told, NORMALISATION[key], strict=True)):
        raise ValueError(f"its semantic encoder normalises with the {key} {told}, not {NORMALISATION[key]}.")


def component_of(state_dict: Mapping[str, Tensor]) -> str:
    """The component of a converted state dict. Raises a ValueError if it belongs to none."""
    for key, component in SIGNATURES.items():
        if key in state_dict:
            return component
    some = ", ".join(sorted(state_dict)[:3])
    raise ValueError(f"its tensors ({some}) belong to none of Stable Cascade's networks.")


def variant_of(state_dict: Mapping[str, Tensor]) -> Variant:
    """The published network of a converted state dict. Raises a ValueError if it is none of them."""
    component = component_of(state_dict)
    variants = [variant for variant in VARIANTS if variant.component == component]
    if not variants:
        raise ValueError(f"{component} has no variants that its width tells apart.")
    key = variants[0].width_key
    if key not in state_dict:
        raise ValueError(f"it has no tensor {key}, which {TITLES[component]} has.")
    shape = tuple(state_dict[key].shape)
    if not shape:
        raise ValueError(f"its {key} has no dimensions.")
    width = shape[0]
    for variant in variants:
        if variant.width == width:
            return variant
    published = " or ".join(str(variant.width) for variant in variants)
    raise ValueError(f"it is {TITLES[component]} of width {width}; published widths are {published}.")


def what_it_is(state_dict: Mapping[str, Tensor]) -> str:
    """The name in errors of a converted state dict's network, such as "the lite Stage C (prior)"."""
    try:
        return variant_of(state_dict).title
    except ValueError:
        return TITLES[component_of(state_dict)]


def controlnet_config(
    shapes: Mapping[str, Sequence[int]], proj_blocks: Sequence[int] = PUBLISHED_BLOCKS
) -> dict[str, Any]:
    """The configuration of a `ControlNet`, from the shapes of its tensors.

    Args:
        shapes: by key.
        proj_blocks: the ResBlocks that get the residuals. No file holds them; the default is the published networks'.

    Raises:
        ValueError: the tensors are not a ControlNet's, or it has another number of projections than `proj_blocks`.
    """
    if "backbone.0.0.weight" in shapes:
        mode, stem = "effnet", "backbone.0.0.weight"
    elif "backbone.0.weight" in shapes:
        mode, stem = "large" if "backbone.10.blocks.0.weight" in shapes else "simple", "backbone.0.weight"
    else:
        raise ValueError("The tensors are not a ControlNet's: backbone.0.0.weight and backbone.0.weight are missing.")
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


def make(network: type[nn.Module], config: Mapping[str, Any], device: str | torch.device = "meta") -> nn.Module:
    """Make a network from its class and configuration. On the meta device, its parameters have no values."""
    empty = without_values() if torch.device(device).type == "meta" else contextlib.nullcontext()
    with torch.device(device), empty:
        return network(**config)


def build(state_dict: Mapping[str, Tensor], network: type[Network], config: Mapping[str, Any]) -> Network:
    """Make a network in evaluation mode from a converted state dict. Uses its tensors without a copy.

    Args:
        state_dict: the tensors of one component.
        network, config: its class and configuration.

    Raises:
        ValueError: a tensor is missing, surplus or of another shape. The sentence names the first one.
    """
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    model = make(network, config)
    wrong = misfit({key: tensor.shape for key, tensor in model.state_dict().items()}, shapes)
    if wrong is not None:
        raise ValueError(f"it does not fit {network.__name__}:{wrong.removeprefix(':')}.")
    return filled(model, state_dict)


def filled(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors into an empty network, without a copy, and set evaluation mode. They must fit, see `misfit`."""
    expected = network.state_dict()
    device = next(iter(tensors.values())).device
    counters = {key: torch.tensor(0, device=device) for key in expected if key.endswith(OPTIONAL_KEYS)}
    known = {key: tensor for key, tensor in tensors.items() if key in expected}
    network.load_state_dict({**counters, **known}, assign=True)
    return network.eval()
