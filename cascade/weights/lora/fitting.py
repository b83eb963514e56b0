"""What a group of an adapter's tensors, which belong to one layer, changes in a network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from cascade.weights.lora import algorithms
from cascade.weights.lora.adapter import Group
from cascade.weights.lora.changes import KINDS, Change, Kind, change_of
from cascade.weights.lora.layers import Layers

# By the published name of the tensor.
Changes = dict[str, list[Change]]


def fitting(group: Group, network: Layers) -> tuple[Changes, set[str]] | None:
    """A group's changes of a network, by the published names of its tensors, and which of the group's tensors are used; None if
    it does not fit."""
    layers = network.layer(group.place.layer)
    if not layers:
        tensor = network.tensor(group.place.layer)
        return None if tensor is None else _of_tensor(group, tensor, network)
    found: Changes = {}
    used: set[str] = set()
    kind = next(((kind, names) for kind in KINDS if (names := kind.names(group.tensors)) is not None), None)
    if kind is not None:
        weights = [f"{layer}.weight" for layer in layers]
        changes = of_weights(kind[0], {name: group.tensors[name] for name in kind[1]}, group.scale, len(layers))
        if changes is None:
            return None
        for name, change in zip(weights, changes, strict=True):
            if not change.fits(network.shapes[name]):
                return None
            found.setdefault(name, []).append(change)
        used |= kind[1]
    for name, several in _of_biases(group, layers, found).items():
        if name in network.shapes and all(change.fits(network.shapes[name]) for _, change in several):
            found.setdefault(name, []).extend(change for _, change in several)
            used |= {part for part, _ in several}
    return (found, used) if found else None


def _of_tensor(group: Group, name: str, network: Layers) -> tuple[Changes, set[str]] | None:
    """ComfyUI's changes of whole tensors, such as biases, by their own names."""
    for kind in KINDS:
        names = kind.names(group.tensors)
        if names is not None and kind.function in (algorithms.difference, algorithms.replacement):
            changes = of_weights(kind, {one: group.tensors[one] for one in names}, None, 1)
            return ({name: changes}, names) if changes and changes[0].fits(network.shapes[name]) else None
    return None


# Tensors with one row per output. They are split where q, k and v are one weight.
BY_OUTPUTS = ("up", "diff", "set")


def of_weights(kind: Kind, tensors: Mapping[str, Tensor], scale: float | None, parts: int) -> list[Change] | None:
    """The change of a weight, or of each of the parts, q, k and v, that lie in it one below the other; None if the tensors
    cannot be such."""
    try:
        change = change_of(kind, tensors, scale)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError):  # alpha is not a number, or the rank is 0
        return None
    if parts == 1:
        return [change]
    stacked = [change.tensors[name] for name in BY_OUTPUTS if name in change.tensors]
    if change.magnitude is not None or any(one.ndim == 0 or len(one) % parts for one in stacked):
        return None
    pieces: list[dict[str, Tensor]] = [dict(change.tensors) for _ in range(parts)]
    for name in BY_OUTPUTS:
        if name in change.tensors:
            for piece, part in zip(pieces, change.tensors[name].chunk(parts), strict=True):
                piece[name] = part
    return [replace(change, tensors=piece) for piece in pieces]


def _of_biases(group: Group, layers: Sequence[str], weights: Changes) -> dict[str, list[tuple[str, Change]]]:
    """The changes of biases, each with the name of the part that it comes from."""
    found: dict[str, list[tuple[str, Change]]] = {}

    def add(part: str, function: Callable[..., Tensor], name: str, scale: float = 1.0) -> None:
        pieces = group.tensors[part].chunk(len(layers)) if group.tensors[part].ndim else ()
        for layer, piece in zip(layers, pieces, strict=False):
            found.setdefault(f"{layer}.bias", []).append((part, Change(function, {name: piece}, scale)))

    if "bias_diff" in group.tensors:
        add("bias_diff", algorithms.difference, "diff")
    if "bias_set" in group.tensors:
        add("bias_set", algorithms.replacement, "set")
    if "up_bias" in group.tensors:
        scales = [change.scale for several in weights.values() for change in several]
        add("up_bias", algorithms.difference, "diff", scales[0] if scales else 1.0)
    # PEFT's factors of outputs act on the bias, too.
    if "ia3_l" in group.tensors and group.scale:
        add("ia3_l", algorithms.ia3_factors, "ia3_l")
    return found
