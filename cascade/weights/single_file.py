"""Checkpoints of other programs: splits a file into networks, and converts names and precision.

A file holds one network, or several under prefixes, in names of the authors, ComfyUI, kohya or diffusers. `split` finds a
network by a tensor that no other network has. The text before that tensor's name is the prefix. `split` returns one state
dict per component, in the names of `cascade.networks`. It needs only names and shapes, so tensors on the meta device serve
to inspect a file before it is read.

The authors' names are `cascade.networks`' with three exceptions: fused attention projections are split, and Stage B's
`clip_mapper` and Stage A's `codebook` are renamed. Weights in 8-bit floating point are multiplied by their scales, if they
have any, and become bfloat16.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from cascade.networks.effnet import IMAGENET_MEAN, IMAGENET_STD
from cascade.networks.eight_bits import EightBits
from cascade.weights.recognise import recognise
from cascade.weights.variants import SIGNATURES, TITLES

logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

# Tensors of ComfyUI's files that no network needs, by the last part of their names: OpenCLIP's scale, which only CLIP's
# training uses; marks of 8-bit files; scales of 8-bit activations, which no network here uses.
SURPLUS = ("logit_scale", "scaled_fp8", "scale_input", "input_scale", "comfy_quant")
# The scale of a tensor `x.weight` is `x.` and one of these.
SCALES = ("scale_weight", "weight_scale")
# ComfyUI's semantic encoder stores the normalisation of pixels as tensors. Here, it is part of the network.
NORMALISATION = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


def split(state_dict: Mapping[str, Tensor], only: str | None = None) -> dict[str, StateDict]:
    """Split a file's tensors by component, without prefixes and in our names.

    Args:
        state_dict: the file's tensors, on any device including "meta". Tensors that belong to no component are dropped and
            logged.
        only: a component of `SIGNATURES`; None: all.

    Raises:
        ValueError: the file holds no component, or one twice. The sentence names the file's model, if it is known.
    """
    prefixes = _prefixes(state_dict)
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


def _prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The component under each prefix. Raises a ValueError as `split` does."""
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
    return prefixes


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
