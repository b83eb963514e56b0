"""Stand-ins for the published repositories: their files, configurations, names and shapes, with random values.

`CONFIGS` holds the published configurations, and `SMALL` the same with small dimensions. `write_repositories` writes
complete repositories of small networks, including published files that are not needed. `write_download` writes the folder
of a finished download, with networks of any size.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.weights import CONTROLNETS, NETWORKS
from cascade.weights.hashing import sha256
from cascade.weights.manifest import Manifest
from cascade.weights.published import PARTS
from tests.test_safety import save_classifier

Config = dict[str, Any]

_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
_RES_TIME = ["SDCascadeResBlock", "SDCascadeTimestepBlock"]
_RES_TIME_ATTN = [*_RES_TIME, "SDCascadeAttnBlock"]
_UNET = {"_class_name": "StableCascadeUNet", "_diffusers_version": "0.27.0.dev0"}
_PRIOR = {
    **_UNET,
    "block_out_channels": [2048, 2048],
    "block_types_per_layer": [_RES_TIME_ATTN, _RES_TIME_ATTN],
    "clip_image_in_channels": 768,
    "clip_seq": 4,
    "clip_text_in_channels": 1280,
    "clip_text_pooled_in_channels": 1280,
    "conditioning_dim": 2048,
    "down_blocks_repeat_mappers": [1, 1],
    "down_num_layers_per_block": [8, 24],
    "dropout": [0.1, 0.1],
    "effnet_in_channels": None,
    "in_channels": 16,
    "kernel_size": 3,
    "num_attention_heads": [32, 32],
    "out_channels": 16,
    "patch_size": 1,
    "pixel_mapper_in_channels": None,
    "self_attn": True,
    "switch_level": [False],
    "timestep_conditioning_type": ["sca", "crp"],
    "timestep_ratio_embedding_dim": 64,
    "up_blocks_repeat_mappers": [1, 1],
    "up_num_layers_per_block": [24, 8],
}
_DECODER = {
    **_UNET,
    "block_out_channels": [320, 640, 1280, 1280],
    "block_types_per_layer": [_RES_TIME, _RES_TIME, _RES_TIME_ATTN, _RES_TIME_ATTN],
    "clip_image_in_channels": None,
    "clip_seq": 4,
    "clip_text_in_channels": None,
    "clip_text_pooled_in_channels": 1280,
    "conditioning_dim": 1280,
    "down_blocks_repeat_mappers": [1, 1, 1, 1],
    "down_num_layers_per_block": [2, 6, 28, 6],
    "dropout": [0, 0, 0.1, 0.1],
    "effnet_in_channels": 16,
    "in_channels": 4,
    "kernel_size": 3,
    "num_attention_heads": [0, 0, 20, 20],
    "out_channels": 4,
    "patch_size": 2,
    "pixel_mapper_in_channels": 3,
    "self_attn": True,
    "switch_level": None,
    "timestep_conditioning_type": ["sca"],
    "timestep_ratio_embedding_dim": 64,
    "up_blocks_repeat_mappers": [3, 3, 2, 2],
    "up_num_layers_per_block": [6, 28, 6, 2],
}
CONFIGS: dict[str, Config] = {
    "prior": _PRIOR,
    "prior_lite": {
        **_PRIOR,
        "block_out_channels": [1536, 1536],
        "conditioning_dim": 1536,
        "down_num_layers_per_block": [4, 12],
        "num_attention_heads": [24, 24],
        "up_num_layers_per_block": [12, 4],
    },
    "decoder": _DECODER,
    "decoder_lite": {
        **_DECODER,
        "block_out_channels": [320, 576, 1152, 1152],
        "down_num_layers_per_block": [2, 4, 14, 4],
        "num_attention_heads": [0, 9, 18, 18],
        "up_blocks_repeat_mappers": [2, 2, 2, 2],
        "up_num_layers_per_block": [4, 14, 4, 2],
    },
    "vqgan": {
        "_class_name": "PaellaVQModel",
        "_diffusers_version": "0.26.0.dev0",
        "_name_or_path": "StableCascade/vqgan",
        "bottleneck_blocks": 12,
        "embed_dim": 384,
        "in_channels": 3,
        "latent_channels": 4,
        "levels": 2,
        "num_vq_embeddings": 8192,
        "out_channels": 3,
        "scale_factor": 0.3764,
        "up_down_scale_factor": 2,
    },
    "text_encoder": {
        "_name_or_path": "StableCascade/text_encoder",
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        "bos_token_id": 49406,
        "dropout": 0.0,
        "eos_token_id": 49407,
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "pad_token_id": 1,
        "projection_dim": 1280,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
        "vocab_size": 49408,
    },
    "image_encoder": {
        "architectures": ["CLIPVisionModelWithProjection"],
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 224,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
    },
    # The authors' single files have no configuration. These are their networks' parameters.
    "effnet": {},
    "previewer": {},
    "controlnet_canny": {"in_channels": 1, "out_channels": 2048, "bottleneck_mode": "effnet"},
    "controlnet_inpainting": {"in_channels": 4, "out_channels": 2048, "bottleneck_mode": "effnet"},
    "controlnet_super_resolution": {"in_channels": 16, "out_channels": 2048, "bottleneck_mode": "large"},
}

_SMALL_PRIOR = {
    "clip_image_in_channels": 16,
    "clip_text_in_channels": 32,
    "clip_text_pooled_in_channels": 32,
    "down_num_layers_per_block": [1, 1],
    "up_num_layers_per_block": [1, 1],
}
_SMALL_DECODER = {
    "clip_text_pooled_in_channels": 32,
    "conditioning_dim": 16,
    "down_num_layers_per_block": [1, 1, 1, 1],
    "up_num_layers_per_block": [1, 1, 1, 1],
}
_DIMENSIONS: dict[str, Config] = {
    "prior": {
        **_SMALL_PRIOR,
        "block_out_channels": [16, 16],
        "conditioning_dim": 16,
        "num_attention_heads": [2, 2],
    },
    "prior_lite": {
        **_SMALL_PRIOR,
        "block_out_channels": [8, 8],
        "conditioning_dim": 8,
        "num_attention_heads": [1, 1],
    },
    "decoder": {**_SMALL_DECODER, "block_out_channels": [8, 16, 16, 16], "num_attention_heads": [0, 0, 2, 2]},
    "decoder_lite": {**_SMALL_DECODER, "block_out_channels": [8, 8, 8, 8], "num_attention_heads": [0, 1, 1, 1]},
    "vqgan": {"bottleneck_blocks": 1, "embed_dim": 16, "num_vq_embeddings": 8},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    },
    "image_encoder": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 16,
    },
    "effnet": {},
    "previewer": {},
    # With the smallest backbone, for the small Stage C.
    **{name: {"out_channels": 16, "bottleneck_mode": "simple"} for name in CONTROLNETS},
}
SMALL: dict[str, Config] = {name: {**config, **_DIMENSIONS[name]} for name, config in CONFIGS.items()}

# Published files that are not needed and not safetensors. Their content must not matter.
SURPLUS = {
    "stabilityai/stable-cascade-prior": (
        ".gitattributes",
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/vocab.json",
    ),
    "stabilityai/stable-cascade": (
        ".gitattributes",
        "LICENSE",
        "README.md",
        "comfyui_checkpoints/stable_cascade_stage_b.safetensors",
        "comfyui_checkpoints/stable_cascade_stage_c.safetensors",
        "figures/collage_1.jpg",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "stage_a.safetensors",
        "stage_b.safetensors",
        "stage_b_bf16.safetensors",
        "stage_b_lite.safetensors",
        "stage_b_lite_bf16.safetensors",
        "stage_c.safetensors",
        "stage_c_bf16.safetensors",
        "stage_c_lite.safetensors",
        "stage_c_lite_bf16.safetensors",
        "stage_c_pretrained.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
    ),
    "Falconsai/nsfw_image_detection": (".gitattributes", "README.md", "optimizer.pt", "pytorch_model.bin"),
}


def write_repositories(root: Path) -> None:
    """Write ``<root>/<owner>/<name>`` for every repository, with small networks.

    The semantic encoder and the previewer have full size, because their files have no configuration.
    """
    for name, part in PARTS.items():
        repository = root / part.repository.name
        _write_part(name, repository, SMALL)
        # Every network is also published in float32, under the name without the variant.
        for path in part.files:
            if ".bf16." in path:
                _write_network(name, repository / path.replace(".bf16.", "."), SMALL, torch.float32)
    # The decoder's repository has its own text encoder.
    for variant in ("model.bf16.safetensors", "model.safetensors"):
        dtype = torch.bfloat16 if ".bf16." in variant else torch.float32
        _write_network("text_encoder", root / "stabilityai/stable-cascade/text_encoder" / variant, SMALL, dtype)
    for name, paths in SURPLUS.items():
        for path in paths:
            file = root / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{path} of {name}\n")


def write_download(
    folder: Path, parts: list[str], configs: Mapping[str, Config] = CONFIGS, device: str | torch.device = "cpu"
) -> None:
    """Write the folder of a finished download of some parts.

    Args:
        folder: the folder of the download.
        parts: keys of ``PARTS``.
        configs: the networks' configurations by part; full size by default.
        device: the device that draws random values: a GPU draws 7 GB in less than a second.
    """
    for name in parts:
        _write_part(name, folder / PARTS[name].repository.folder, configs, device)
    paths = [path for name in parts for path in PARTS[name].paths]
    Manifest(parts, {path: sha256(folder / path) for path in paths}).write(folder)


def empty_network(name: str, config: Config) -> nn.Module:
    """A part's network, on the meta device."""
    component = PARTS[name].component
    with torch.device("meta"):
        return NETWORKS[component].from_config(config)


def random_tensors(network: nn.Module, dtype: torch.dtype, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """A network's state dict on the CPU, with random values that keep activations moderate at any depth and width."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, empty in network.state_dict().items():
        if not empty.is_floating_point():  # a counter
            tensors[name] = torch.zeros(empty.shape, dtype=empty.dtype)
            continue
        values = torch.randn(empty.shape, generator=generator, dtype=dtype, device=device)
        if empty.ndim > 1:
            values *= empty[0].numel() ** -0.5
            if ".mapper" in name:  # timestep mappers, which scale activations in each of a hundred blocks
                values *= 0.1
        elif name.endswith(("weight", "running_var")):  # normalisation layers
            values.mul_(0.1).add_(1)
        else:
            values *= 0.1
        tensors[name] = values.cpu()
    return tensors


def _write_part(name: str, repository: Path, configs: Mapping[str, Config], device: str | torch.device = "cpu") -> None:
    part = PARTS[name]
    if name == "safety_checker":
        save_classifier(repository, {"normal": 5.0, "nsfw": 0.0})
        return
    for path in part.files:
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
    if name == "tokenizer":
        for path, content in zip(part.files, make_tokenizer(), strict=True):
            _write_json(repository / path, content)
    elif name == "feature_extractor":
        _write_json(repository / part.files[0], CLIP_PROCESSOR)
    else:
        _write_network(name, repository / part.files[-1], configs, _DTYPES[part.dtype], device)


def _write_network(
    name: str, file: Path, configs: Mapping[str, Config], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if not PARTS[name].is_checkpoint:
        _write_json(file.with_name("config.json"), configs[name])
    save_file(random_tensors(empty_network(name, configs[name]), dtype, device), file, metadata={"format": "pt"})


def _write_json(file: Path, content: Config) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


CLIP_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}


def make_tokenizer() -> tuple[Config, Config]:
    """Make ``tokenizer.json`` and ``tokenizer_config.json``: CLIP's tokenizer with only two merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "in", "th"]
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    added = {49406: {"content": start, "normalized": True, **special}}
    added[49407] = {"content": end, "normalized": False, **special}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 49407,
            "pad_type_id": 0,
            "pad_token": end,
        },
        "added_tokens": [{"id": number, **token} for number, token in added.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, 49407],
            "cls": [start, 49406],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": end,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**{piece: i for i, piece in enumerate(pieces)}, start: 49406, end: 49407},
            "merges": ["i n", "t h"],
        },
    }
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(number): token for number, token in added.items()},
        "bos_token": start,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": end,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": end,
    }
    return tokenizer, config
