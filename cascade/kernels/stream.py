"""The residual stream between the blocks of Stages B and C."""

from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """A branch's product in e4m3 that the samples' scales are not applied to yet.

    Attributes:
        value: (B, H, W, C), in the weights' dtype.
        scale: float32 (B,).
    """

    value: Tensor
    scale: Tensor


class Stream(NamedTuple):
    """The residual stream, with pending operations: (x + product + bias) * (1 + scale) + shift.

    The next block applies them when it reads the stream.

    Attributes:
        x: float32 (B, H, W, C).
        bias: (C,), in the weights' dtype.
        scale, shift: float32 (B, C).
        product: of a branch in e4m3, see `kernels.e4m3`.
    """

    x: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    product: Product | None = None

    def settle(self) -> Tensor:
        """Apply the pending operations: float32 (B, H, W, C)."""
        x = self.x
        if self.product is not None:
            x = x + self.product.value * self.product.scale[:, None, None, None]
        x = x if self.bias is None else x + self.bias
        if self.scale is None:
            return x
        return torch.addcmul(self.shift[:, None, None], x, 1 + self.scale[:, None, None])

    def modulate(self, scale: Tensor, shift: Tensor) -> "Stream":
        if self.scale is None:
            return self._replace(scale=scale, shift=shift)
        return Stream(self.settle(), scale=scale, shift=shift)
