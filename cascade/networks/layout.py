"""Published names in state dicts, stacked layers in memory.

A network computes some published layers as one "stacked" layer, whose weight and bias are theirs, concatenated along the
output channels. State dicts and files hold the published tensors. `publish` sets up both directions:

- `state_dict()` returns views of the stacked parameters under the published names, in the order that a network of the
  published layers would have. Changing such a tensor in place changes the network.
- `load_state_dict()`, with or without `assign`, accepts the published names or the stacked layers' names. Its errors use the
  published names.

A stacked layer that was wrapped (PEFT) or replaced has other keys in state dicts. They are not converted.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# The scale of a weight in 8 bits, see `eight_bits`. Its rows are those of the weight.
SCALE = "weight_scale"
KINDS = ("weight", "bias", SCALE)


def publish(network: nn.Module, stacked: Mapping[str, Mapping[str, int]]) -> None:
    """Make a network's state dicts hold published tensors.

    Args:
        network: the complete network.
        stacked: {name of a stacked layer: {name of a published layer: its output channels (rows of the weight)}}, with the
            published layers in order.
    """
    network.stacked_layers = {name: dict(parts) for name, parts in stacked.items()}
    network.register_state_dict_post_hook(_split)
    network.register_load_state_dict_pre_hook(_stack)


def published_names(network: nn.Module) -> dict[str, list[str]]:
    """The published names in each parameter, in order, by its name in `network.named_parameters()`.

    network: any module. Networks inside of it are found.
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
    """Each stacked tensor's name, and the published tensors in it with their rows."""
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
    """Give a contiguous view a storage of its own: the same memory, but only the view's part of it.

    accelerate takes tensors with the same storage for duplicates, and saves only one of them in a checkpoint.
    """
    # Not for views that require gradients (keep_vars), nor on devices without plain addresses (meta, MPS).
    plain = type(view) is Tensor and view.device.type in ("cpu", "cuda") and view.is_contiguous()
    if view.requires_grad or not plain:
        return view
    first, size = view.storage_offset() * view.element_size(), view.nbytes
    storage = view.untyped_storage()[first : first + size]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(storage, 0, view.shape, view.stride())


def _published_order(network: nn.Module, prefix: str) -> Iterator[str]:
    """The state dict's keys in the order that a network of the published layers would have."""
    inside: dict[str, list[str]] = {}  # published layers by their parent module
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
            state_dict.update(given)  # the layer was replaced, or the state dict has stacked layers' names
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
        # Missing or misshapen parts keep the network's values, if it has any (not on the meta device).
        places = {piece.device for piece in pieces}
        if len(places) > 1 and not present.is_meta:
            pieces = [piece.to(present.device) for piece in pieces]
        state_dict[name] = present if len(places) > 1 and present.is_meta else torch.cat(pieces)


def _parameter(network: nn.Module, name: str) -> Tensor | None:
    """A stacked layer's own parameter; None if the layer was replaced by one without such a parameter."""
    layer, _, kind = name.rpartition(".")
    found = network.get_submodule(layer)._parameters.get(kind)
    return None if found is None else found.detach()
