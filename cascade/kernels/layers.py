"""Tells layers whose weights may be read directly from layers that must be called, and computes with both."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredLinear(nn.Linear):
    """A Linear layer whose `weight` holds the matrix in another form, from which it is computed for each use."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        return self.bias.dtype

    def matrix(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last - 1` of the matrix, in `dtype`: (last - first, K). None: to the end."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)


def is_ordinary(layer: nn.Module) -> bool:
    """Whether a layer is a plain torch Linear or Conv2d, so that its weight and bias may be read instead of calling it.

    False for a layer of another class (PEFT, quantised, parametrised), with hooks, with a replaced `forward`, or with a weight
    of a tensor subclass (torchao). Such a layer must be called.
    """
    plain = type(layer) in (nn.Linear, nn.Conv2d) and type(layer.weight) in (nn.Parameter, Tensor)
    return plain and not is_hooked(layer)


def is_readable(layer: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Whether `matrix_of` may be used instead of calling a layer: an ordinary one, or a `StoredLinear` without hooks.

    dtype: also in which it must compute; None: any.
    """
    readable = is_ordinary(layer) or (isinstance(layer, StoredLinear) and not is_hooked(layer))
    return readable and dtype in (None, _dtype_of(layer))


def matrix_of(layer: nn.Linear, first: int = 0, last: int | None = None) -> Tensor:
    """Rows `first` to `last - 1` of the matrix of a Linear layer that `is_readable`."""
    return layer.matrix(first, last) if isinstance(layer, StoredLinear) else layer.weight[first:last]


def _dtype_of(layer: nn.Module) -> torch.dtype | None:
    """The dtype in which a layer computes; None for a layer without parameters."""
    if isinstance(layer, StoredLinear):
        return layer.dtype
    weight = next(layer.parameters(), None)
    return None if weight is None else weight.dtype


def is_hooked(layer: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` that replaces its class's."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return "forward" in layer.__dict__ or any(hooks)


def columns(layer: nn.Module, x: Tensor, first: int, last: int) -> Tensor:
    """Output channels `first` to `last - 1` of a Linear layer for x (..., K): (..., last - first).

    Computes only these, if the matrix can be read.
    """
    if not is_readable(layer):
        return layer(x)[..., first:last]
    return F.linear(x, matrix_of(layer, first, last), None if layer.bias is None else layer.bias[first:last])


def has_float16_weights(layer: nn.Module) -> bool:
    return _dtype_of(layer) == torch.float16


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` in float32, with float16 weights converted to float32. x: float32."""
    if is_hooked(layer):  # the hooks may use float16 weights of their own
        largest = torch.finfo(torch.float16).max
        return layer(x.clamp(-largest, largest).half()).float()
    half = {name: weight.float() for name, weight in layer.named_parameters() if weight.dtype == torch.float16}
    return torch.func.functional_call(layer, half, (x,))


@torch.no_grad()
def put_channels_side_by_side(convolution: nn.Module) -> None:
    """Store a depthwise weight (C, 1, k, k) in memory as (1, k, k, C). Its shape and values stay, its strides change.

    The kernel then reads neighbouring channels from neighbouring addresses.
    """
    if is_ordinary(convolution):
        weight = convolution.weight
        weight.data = weight.data.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
