"""The residual stream between the blocks of Stages B and C."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """The residual stream, with pending operations: (x + bias) * (1 + scale) + shift.

    The next block applies them when it reads the stream.

    Attributes:
        x: float32 (B, H, W, C).
        bias: (C,), in the weights' dtype.
        scale, shift: float32 (B, C).
    """

    x: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    def settle(self) -> Tensor:
        """Apply the pending operations: float32 (B, H, W, C)."""
        x = self.x if self.bias is None else self.x + self.bias
        if self.scale is None:
            return x
        return torch.addcmul(self.shift[:, None, None], x, 1 + self.scale[:, None, None])

    def modulate(self, scale: Tensor, shift: Tensor) -> "Stream":
        if self.scale is None:
            return self._replace(scale=scale, shift=shift)
        return Stream(self.settle(), scale=scale, shift=shift)
