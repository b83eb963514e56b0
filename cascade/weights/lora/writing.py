"""Writes an adapter as one safetensors file that needs no settings beside it.

LoRA, LoCon, LoHa, LoKr, GLoRA, OFT, differences and biases get the names that kohya's trainer has written since 25 February
2024 and ComfyUI reads, with alpha. Kinds that only PEFT computes keep PEFT's names and diffusers' metadata. Words of the
authors' training keep their tensors; their names go into the metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.weights.lora import algorithms, authors, peft
from cascade.weights.lora.adapter import BUNDLED
from cascade.weights.lora.changes import Change, Function
from cascade.weights.lora.layers import Shapes, flat
from cascade.weights.lora.parts import SUFFIXES
from cascade.weights.lora.placing import Placed

# The first suffix of each part is kohya's or LyCORIS'.
NAMES = {name: suffix for suffix, name in reversed(SUFFIXES.items())}
# Kinds whose alpha is divided by the size of a tensor: of the first of these that exists.
RANKS: dict[Function, tuple[str, ...]] = {
    algorithms.lora: ("down",),
    algorithms.loha: ("w1_b",),
    algorithms.lokr: ("k2_b", "k1_b"),
    algorithms.glora: ("a2",),
}
ONLY_PEFT: dict[Function, str] = {algorithms.oft_inputs: "OFT", algorithms.ia3_factors: "IA3"}


def write(placed: Placed, shapes: Mapping[str, Shapes], path: Path) -> None:
    """Write an adapter.

    Args:
        placed: in a model's networks.
        shapes: of these, as `place` took them.
        path: the new file.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    adapter = placed.adapter
    tensors: dict[str, Tensor] = {}
    for network, changes in placed.changes.items():
        for name, several in changes.items():
            for change in several:
                tensors |= _tensors(network, name, change, shapes[network][name])
    for name, kinds in adapter.words.items():
        tensors |= {f"{BUNDLED}{name}.{kind}": vectors for kind, vectors in kinds.items()}
    if adapter.rows is not None:
        tensors |= zip((authors.VECTORS, authors.INDICES), adapter.rows, strict=True)
    stored = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(stored, path, metadata=_metadata(placed))
    path.chmod(mode)  # safetensors makes it readable by the owner only


def _tensors(network: str, name: str, change: Change, shape: Sequence[int]) -> dict[str, Tensor]:
    layer, _, kind = name.rpartition(".")
    if change.function is algorithms.rows:
        return {}  # among the authors' words
    if change.function in ONLY_PEFT:
        stem = f"{network}.{layer}"
        return {f"{stem}.{NAMES[one]}": tensor for one, tensor in change.tensors.items()} if kind == "weight" else {}
    if change.function in (algorithms.difference, algorithms.replacement):
        return {_whole(network, layer, kind, change): next(iter(change.tensors.values())) * change.scale}
    stem = _stem(network, layer)
    return {f"{stem}.{NAMES[one]}": tensor for one, tensor in _parts(change, shape)}


def _stem(network: str, layer: str) -> str:
    if network == "text_encoder":
        # The name of the projection that ComfyUI knows.
        return f"lora_prior_te_{layer}" if layer == "text_projection" else f"lora_te_{flat(layer)}"
    return f"lora_unet_{flat(_comfyui(network, layer))}"


def _comfyui(network: str, layer: str) -> str:
    if network == "decoder" and layer == "clip_txt_pooled_mapper":
        return "clip_mapper"
    return layer.replace("attention.to_out.0", "attention.attn.out_proj").replace("attention.to_", "attention.attn.to_")


def _whole(network: str, layer: str, kind: str, change: Change) -> str:
    """The key of a full difference or a full replacement of a tensor."""
    added = change.function is algorithms.difference
    if kind == "weight":
        return f"{_stem(network, layer)}.{'diff' if added else 'set_weight'}"
    if kind == "bias":
        return f"{_stem(network, layer)}.{'diff_b' if added else 'bias'}"
    return f"diffusion_model.{_comfyui(network, layer)}.{kind}.{'diff' if added else 'set_weight'}"


def _parts(change: Change, shape: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    tensors, scale = dict(change.tensors), change.scale
    if change.function is algorithms.lora and len(shape) == 4:
        tensors["up"] = tensors["up"].reshape(*tensors["up"].shape[:2], 1, 1)
        if tensors["down"].ndim == 2:  # the authors': one number for all taps
            kernel = tuple(shape[2:]) if tensors["down"].shape[1] == shape[1] else (1, 1)
            tensors["down"] = tensors["down"][:, :, None, None].expand(-1, -1, *kernel)
    if change.function in (algorithms.ia3, algorithms.ia3_inputs):
        tensors["on_input"] = torch.tensor(int(change.function is algorithms.ia3_inputs))
    yield from tensors.items()
    if change.magnitude is not None:
        magnitude = change.magnitude
        yield "magnitude", magnitude.reshape(-1, *[1] * (len(shape) - 1)) if magnitude.ndim == 1 else magnitude
    ranks = [len(tensors[name]) for name in RANKS.get(change.function, ()) if name in tensors]
    if ranks:
        yield "alpha", torch.tensor(scale * ranks[0])
    elif change.function in (algorithms.oft, algorithms.boft):
        yield "alpha", torch.tensor(scale)  # a constraint
    elif scale != 1:
        first = next(name for name in ("k1", "w1_a") if name in tensors)
        yield first, tensors[first] * scale  # LoKr of two whole matrices, whose alpha other programs ignore


def _metadata(placed: Placed) -> dict[str, str]:
    adapter = placed.adapter
    metadata = {"ss_base_model_version": "stable_cascade", "converted_from": adapter.format}
    if adapter.settings is not None:
        told = {"module_filters": adapter.settings.module_filters, "train_tokens": adapter.settings.train_tokens}
        metadata[authors.METADATA] = json.dumps(told)
    configs = dict(_configs(placed))
    if configs:
        metadata[peft.METADATA] = json.dumps(configs)
    return metadata


def _configs(placed: Placed) -> Iterator[tuple[str, object]]:
    """The configuration of PEFT's kinds in diffusers' form, by network and name."""
    for network, changes in placed.changes.items():
        inputs = []
        for name, several in changes.items():
            for change in several:
                if change.function not in ONLY_PEFT or not name.endswith(".weight"):
                    continue
                yield f"{network}.peft_type", ONLY_PEFT[change.function]
                if change.function is algorithms.oft_inputs:
                    yield f"{network}.use_cayley_neumann", change.scale != 0
                    yield f"{network}.num_cayley_neumann_terms", change.scale or 5
                elif not change.scale:
                    inputs.append(name.removesuffix(".weight"))
        if inputs:
            yield f"{network}.feedforward_modules", inputs
