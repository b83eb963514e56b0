"""Layers that read the same input, laid side by side in memory so that one kernel can run them all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Joined(NamedTuple):
    """The weights and biases of some Linears, stacked along the first axis."""

    weight: Tensor
    bias: Tensor

    def holds(self, linear: nn.Module) -> bool:
        """Whether the parameters of `linear`, the first of them, still lie here: they don't after a move or an exchange."""
        return isinstance(linear, nn.Linear) and linear.weight.data_ptr() == self.weight.data_ptr()


@torch.no_grad()
def join(linears: Sequence[nn.Linear]) -> Joined:
    """Moves the parameters of Linears of the same inputs into one memory. The Linears work on, as views of it."""
    joined = Joined(torch.cat([one.weight for one in linears]), torch.cat([one.bias for one in linears]))
    row = 0
    for linear in linears:
        rows = slice(row, row + linear.out_features)
        linear.weight.data, linear.bias.data = joined.weight[rows], joined.bias[rows]
        row = rows.stop
    return joined
