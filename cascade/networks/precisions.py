"""How a network keeps its weights: which of them in 8 bits, in which form, and the layers that compute with them.

A form is named by the dtype of its numbers: int8 is storage (`eight_bits`), e4m3 is for products (`fp8`). With the precision
"fp8", weights that are used once a picture are int8, which is more exact.
"""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.kernels.e4m3 import E4M3
from cascade.networks import eight_bits, fp8
from cascade.networks.eight_bits import EightBitLinear, EightBits, rounded_names, scale_of
from cascade.networks.fp8 import Fp8Linear
from cascade.networks.layout import published_names

# The precisions in which weights are in 8 bits.
IN_8_BITS = ("int8", "fp8")


class Form(NamedTuple):
    """A form of weights in 8 bits: how a matrix is rounded to it, the layer that has such a weight, and whether all of a
    matrix's scales are equal."""

    quantise: Callable[[Tensor], EightBits]
    layer: type[EightBitLinear]
    has_one_scale: bool


FORMS = {torch.int8: Form(eight_bits.quantise, EightBitLinear, False), E4M3: Form(fp8.quantise, Fp8Linear, True)}
# The form of each weight in 8 bits, by its published name.
Forms = Mapping[str, torch.dtype]


def wanted_forms(shapes: Mapping[str, Sequence[int]], network: str, precision: str) -> dict[str, torch.dtype]:
    """The form that a precision wants of each weight it keeps in 8 bits, by published name.

    Args:
        shapes: of all of its tensors, by published name.
        network: the component.
        precision: "full", "int8" or "fp8".
    """
    if precision not in IN_8_BITS:
        return {}
    rounded = rounded_names(shapes, network)
    if precision == "int8":
        return dict.fromkeys(rounded, torch.int8)
    stored = {name: torch.int8 for name in rounded if fp8.is_step_invariant(name)}
    return stored | dict.fromkeys(fp8.names_of_products(shapes, rounded), E4M3)


def stored_precision(tensors: Mapping[str, torch.dtype]) -> str:
    """The precision in which tensors with these names and dtypes are stored: "full", "int8" or "fp8"."""
    return _precision({dtype for name, dtype in tensors.items() if scale_of(name) in tensors})


def bytes_of(shape: Sequence[int], form: torch.dtype) -> int:
    """Bytes of a matrix in 8 bits, with its scales."""
    return sum(one.nbytes for one in FORMS[form].layer.empty(*shape, torch.device("meta")))


def rounded(tensors: Mapping[str, Tensor], forms: Forms) -> dict[str, Tensor]:
    """Tensors, those of `forms` in 8 bits, which were in floating point."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in forms and tensor.is_floating_point():
            made[name], made[scale_of(name)] = FORMS[forms[name]].quantise(tensor)
        else:
            made[name] = tensor
    return made


def without_scale(forms: Forms, names: Container[str]) -> dict[str, torch.dtype]:
    """The forms of those weights that are not in 8 bits among tensors of these names."""
    return {name: form for name, form in forms.items() if scale_of(name) not in names}


def converted(tensors: Mapping[str, Tensor], forms: Forms, dtype: torch.dtype) -> dict[str, Tensor]:
    """Published tensors, those in 8 bits in the form that `forms` names. Others become matrices in `dtype`."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        scale = tensors.get(scale_of(name))
        if scale is None or forms.get(name) == tensor.dtype:
            continue
        matrix = EightBits(tensor, made.pop(scale_of(name)))
        if name in forms:
            made[name], made[scale_of(name)] = FORMS[forms[name]].quantise(matrix.restored(torch.float32))
        else:
            made[name] = matrix.restored(dtype)
    return made


def use_forms(network: nn.Module, forms: Forms) -> None:
    """Replace the Linear layers of a network whose published weights have a form. The new layers have no values yet.

    Args:
        network: complete, its parameters on the meta device.
        forms: see `wanted_forms`.
    """
    names = published_names(network)
    for name, module in list(network.named_modules()):
        kinds = {forms[part] for part in names.get(f"{name}.weight", ()) if part in forms}
        if type(module) is nn.Linear and len(kinds) == 1:
            network.set_submodule(name, FORMS[kinds.pop()].layer(module))


def stored_forms(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The forms of those tensors that are stored in 8 bits, by name."""
    return {name: tensor.dtype for name, tensor in tensors.items() if scale_of(name) in tensors}


def network_precision(network: nn.Module) -> str:
    """The precision of a network, by its layers: "full", "int8" or "fp8"."""
    return _precision({module.weight.dtype for module in network.modules() if isinstance(module, EightBitLinear)})


def _precision(forms: Collection[torch.dtype]) -> str:
    """The precision in which weights have these forms."""
    return "fp8" if E4M3 in forms else "int8" if forms else "full"
