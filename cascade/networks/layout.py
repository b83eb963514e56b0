"""Published names in state dicts, stacked layers in memory.

A network runs some layers of its published files as one: the "stacked" layer has their weights and biases one below the other.
State dicts and files hold the published tensors. `publish` sets up both directions:

- `state_dict()` gives views of the stacked parameters under the published names, in the order that a network of the published
  layers would have. A change of such a tensor in place changes the network.
- `load_state_dict()`, with or without `assign`, takes published names, or those of the stacked layers, and names missing and
  misshapen tensors as published.

A stacked layer that was wrapped (PEFT) or replaced has other keys in state dicts, which stay as they are.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("weight", "bias")


def publish(network: nn.Module, stacked: Mapping[str, Mapping[str, int]]) -> None:
    """Have a network's state dicts hold published tensors.

    Args:
        network: with all of its layers.
        stacked: for each stacked layer, by its name, the published layers in order: their names, and how many output channels
            (rows of the weight) each has.
    """
    network.stacked_layers = {name: dict(parts) for name, parts in stacked.items()}
    network.register_state_dict_post_hook(_split)
    network.register_load_state_dict_pre_hook(_stack)


def published_names(network: nn.Module) -> dict[str, list[str]]:
    """For each parameter, by its name in `network.named_parameters()`, the published ones that it consists of, in order.

    network: any module; networks inside it are found.
    """
    names = {}
    for name, _ in network.named_parameters():
        names[name] = [name]
    for prefix, inner in network.named_modules():
        for layer, parts in getattr(inner, "stacked_layers", {}).items():
            start = f"{prefix}." if prefix else ""
            for kind in KINDS:
                if f"{start}{layer}.{kind}" in names:
                    names[f"{start}{layer}.{kind}"] = [f"{start}{part}.{kind}" for part in parts]
    return names


def _pieces(network: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The name of each stacked tensor, and the published tensors in it with their rows."""
    for layer, parts in network.stacked_layers.items():
        for kind in KINDS:
            yield f"{prefix}{layer}.{kind}", {f"{prefix}{part}.{kind}": rows for part, rows in parts.items()}


def _split(network: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace the stacked tensors of a state dict by the published ones."""
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
    for name, parts in _pieces(network, prefix):
        stacked = own.get(name)
        if isinstance(stacked, Tensor) and stacked.ndim and len(stacked) == sum(parts.values()):
            del own[name]
            own |= zip(parts, map(_with_own_storage, stacked.split(list(parts.values()))), strict=True)
    order = {key: place for place, key in enumerate(_published_order(network, prefix))}
    state_dict.update((key, own[key]) for key in sorted(own, key=lambda key: order.get(key, len(order))))


def _with_own_storage(view: Tensor) -> Tensor:
    """A contiguous view of a part of a tensor, as a tensor whose storage is that part of the memory.

    accelerate takes tensors with one storage for duplicates, and leaves all but one out of a checkpoint.
    """
    # Not of parameters that are wanted as such (keep_vars), nor where memory has no plain addresses (meta, MPS).
    plain = type(view) is Tensor and view.device.type in ("cpu", "cuda") and view.is_contiguous()
    if view.requires_grad or not plain:
        return view
    first, size = view.storage_offset() * view.element_size(), view.nbytes
    storage = view.untyped_storage()[first : first + size]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(storage, 0, view.shape, view.stride())


def _published_order(network: nn.Module, prefix: str) -> Iterator[str]:
    """The keys of a network of the published layers, in the order of its modules."""
    inside: dict[str, list[str]] = {}  # the published layers, by the module that has them
    for part in itertools.chain(*network.stacked_layers.values()):
        inside.setdefault(part.rpartition(".")[0], []).append(part)
    for name, module in network.named_modules():
        start = f"{name}." if name else ""
        for part in inside.get(name, ()):
            yield from (f"{prefix}{part}.{kind}" for kind in KINDS)
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        yield from (f"{prefix}{start}{key}" for key, _ in own)


def _stack(
    network: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Replace the published tensors of a state dict that is being loaded by the stacked ones."""
    for name, parts in _pieces(network, prefix):
        given = {part: state_dict.pop(part).detach() for part in parts if part in state_dict}
        present = _parameter(network, name.removeprefix(prefix))
        if present is None or len(present) != sum(parts.values()) or (not given and name in state_dict):
            state_dict.update(given)  # a replaced layer, or a state dict of stacked layers
            continue
        pieces = []
        for part, current in zip(parts, present.split(list(parts.values())), strict=True):
            piece = given.get(part)
            if piece is None:
                missing_keys.append(part)
            elif piece.shape != current.shape:
                error_msgs.append(
                    f"size mismatch for {part}: copying a param with shape {piece.shape} from checkpoint, "
                    f"the shape in current model is {current.shape}."
                )
            pieces.append(current if piece is None or piece.shape != current.shape else piece)
        # What is missing or does not fit keeps its values, as far as there are any.
        places = {piece.device for piece in pieces}
        if len(places) > 1 and not present.is_meta:
            pieces = [piece.to(present.device) for piece in pieces]
        state_dict[name] = present if len(places) > 1 and present.is_meta else torch.cat(pieces)


def _parameter(network: nn.Module, name: str) -> Tensor | None:
    """A stacked layer's own parameter; None if the layer was replaced by one that has no such parameter."""
    layer, _, kind = name.rpartition(".")
    found = network.get_submodule(layer)._parameters.get(kind)
    return None if found is None else found.detach()
