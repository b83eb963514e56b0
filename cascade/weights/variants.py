"""The published networks: their configurations, and which of them a state dict holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cascade.networks.clip import TextTower, VisionTower
from cascade.networks.controlnet import PUBLISHED_BLOCKS
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet

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
