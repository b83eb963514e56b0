"""A `Change`: an adapter's change of one tensor of a network. `merged` adds several, with their scales, in float32."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.weights.lora import algorithms

Function = Callable[[Tensor, Mapping[str, Tensor], float], Tensor]


class Kind(NamedTuple):
    """A kind of adapter of one weight.

    Attributes:
        title: its usual name.
        function: of `algorithms`.
        needed: the names in `parts.SUFFIXES` of its tensors. "k1|k1_a+k1_b" means either k1, or both k1_a and k1_b.
        optional: further tensors.
        rank: tensors whose first dimension is the rank; the first one that exists is used.
        constrained: whether alpha is a constraint, and not divided by a rank.
    """

    title: str
    function: Function
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    constrained: bool = False

    def names(self, there: Iterable[str]) -> set[str] | None:
        """The names of the present tensors that belong to this kind; None if a needed one is missing."""
        there = set(there)
        used = {name for name in self.optional if name in there}
        for need in self.needed:
            ways = [set(way.split("+")) for way in need.split("|")]
            way = next((way for way in ways if way <= there), None)
            if way is None:
                return None
            used |= way
        return used


# The only tensor of integers, see `algorithms.rows`.
INDICES = "indices"
# What accompanies the factors of low rank: alpha, and DoRA's magnitude.
BESIDE = ("alpha", "magnitude")
KINDS = (
    Kind("LoRA", algorithms.lora, ("up", "down"), ("mid", *BESIDE), ("down",)),
    Kind("LoHa", algorithms.loha, ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2", *BESIDE), ("w1_b",)),
    Kind("LoKr", algorithms.lokr, ("k1|k1_a+k1_b", "k2|k2_a+k2_b"), ("k2_t", *BESIDE), ("k2_b", "k1_b")),
    Kind("GLoRA", algorithms.glora, ("a1", "a2", "b1", "b2"), BESIDE, ("a2",)),
    Kind("OFT", algorithms.oft, ("oft_blocks",), ("rescale", "alpha"), constrained=True),
    Kind("OFT", algorithms.oft_inputs, ("oft_R",)),
    Kind("IA3", algorithms.ia3, ("weight", "on_input")),
    Kind("IA3", algorithms.ia3_factors, ("ia3_l",)),
    Kind("a full difference", algorithms.difference, ("diff",), ("alpha",)),
    Kind("full weights", algorithms.replacement, ("set",)),
)


@dataclass(frozen=True, eq=False)
class Change:
    """An adapter's change of one tensor.

    Attributes:
        function: of `algorithms`.
        tensors: its arguments, as stored in the file.
        scale: its further argument, usually alpha / rank.
        magnitude: of DoRA.
        whole: whether every scale except 0 acts like 1, as for learned words.
    """

    function: Function
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    whole: bool = False

    def delta(self, weight: Tensor) -> Tensor:
        """Trained weight - weight, float32.

        weight: the base weight, float32. The result is in its shape and on its device.
        Raises ValueError, RuntimeError or IndexError if the adapter is of another shape.
        """
        tensors = {
            name: _on(weight.device, tensor) if name == INDICES else _beside(tensor, weight)
            for name, tensor in self.tensors.items()
        }
        delta = self.function(weight, tensors, self.scale)
        if self.magnitude is not None:
            delta = algorithms.decomposed(weight, delta, _beside(self.magnitude, weight))
        return delta

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether this change fits a tensor of this shape. Runs on the meta device, so it computes no values."""
        if self.function is algorithms.lora and self.magnitude is None and "mid" not in self.tensors:
            return algorithms.lora_fits(shape, self.tensors["up"].shape, self.tensors["down"].shape)
        try:
            return self.delta(torch.empty(tuple(shape), device="meta")).shape == torch.Size(shape)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
            return False


def _beside(tensor: Tensor, weight: Tensor) -> Tensor:
    # Moved in its stored dtype: in one call, torch would convert it on the host first, and move twice the bytes.
    return _on(weight.device, tensor).to(torch.float32)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        # From other memory, the copy would wait for all work of the GPU, and this thread for the copy. torch reuses the pinned
        # memory when the copy is done.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def scale_of(kind: Kind, tensors: Mapping[str, Tensor]) -> float:
    """The factor that the tensors of an adapter mean: alpha / rank; 1 without alpha or without a rank.

    Of LoKr with two whole matrices, alpha is ignored, as in LyCORIS and ComfyUI.
    """
    if "alpha" not in tensors:
        return 5.0 if kind.function is algorithms.oft_inputs else float(not kind.constrained)
    alpha = float(tensors["alpha"])
    if kind.constrained:
        return max(alpha, 0.0)
    rank = next((len(tensors[name]) for name in kind.rank if name in tensors), None)
    return 1.0 if rank is None else alpha / rank


def change_of(kind: Kind, tensors: Mapping[str, Tensor], scale: float | None) -> Change:
    """The change of a weight.

    Args:
        kind: one of `KINDS`.
        tensors: its own, by the names of `parts.SUFFIXES`.
        scale: a scale from elsewhere, such as PEFT's configuration; None: the one in the tensors. Whole weights have none.
    """
    if scale is None or not (kind.rank or kind.function in (algorithms.oft_inputs, algorithms.ia3_factors)):
        scale = scale_of(kind, tensors)
    rest = {name: tensor for name, tensor in tensors.items() if name not in BESIDE}
    function = kind.function
    if function is algorithms.oft and rest["oft_blocks"].ndim == 4:
        function = algorithms.boft
    if function is algorithms.ia3 and float(rest.pop("on_input")) == 1:
        function = algorithms.ia3_inputs
    return Change(function, rest, scale, tensors.get("magnitude"))


def merged(weight: Tensor, changes: Iterable[tuple[Change, float]]) -> Tensor:
    """A weight with adapters, in float32: weight + the sum of strength * (trained weight - weight).

    Each adapter starts from the base weight, so their order changes only rounding.

    Args:
        weight: the base weight, of any floating-point dtype.
        changes: each with the strength of its adapter. Strength 0 leaves the weight as it is.
    """
    base = result = weight.float()
    for change, strength in changes:
        if strength:
            result = torch.add(result, change.delta(base), alpha=1.0 if change.whole else strength)
    return result


def finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite in float32, the dtype of the computation."""
    if not tensor.is_floating_point():
        return True
    # These are summed as they are: a copy in float32 takes longer than the sum. A sum that is too large proves nothing.
    numbers = tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())
