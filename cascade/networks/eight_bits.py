"""Weights in 8 bits: half of the memory, disk and uploads of 16 bits. Products are computed as without.

A matrix is stored as int8 with a scale for each group of neighbours in a row. A row belongs to an output channel, and its
groups share that channel's sum. Right before each product, the layer computes the matrix from them, in its own dtype. So
activations are not quantised, and any device can use such weights.

Why int8 and groups: docs/experiments.md. Names in state dicts and files are those of compressed-tensors: `x.weight` and
`x.weight_scale`.
"""

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.kernels import UsesKernels, plain
from cascade.kernels.layers import StoredLinear
from cascade.networks.layout import SCALE

# Of the values in a group, at most.
GROUP = 64
LARGEST = 127
# The networks that have such weights, and the published names of these: the Linear layers of all blocks of Stages B and C, and
# of all layers of CLIP, see `rounded_names`.
NETWORKS = ("text_encoder", "image_encoder", "prior", "decoder")
NAMES = re.compile(
    r"(down|up)_blocks\.\d+\.\d+\.(channelwise\.[04]|attention\.to_[qkv]|attention\.to_out\.0|kv_mapper\.1)\.weight"
    r"|(text|vision)_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
)
LAST = re.compile(r"up_blocks\.(\d+)\.(\d+)\.channelwise\..*")


class EightBits(NamedTuple):
    """A matrix (N, K) in 8 bits.

    weight: int8 (N, K), from -127 to 127; or e4m3 (N, K), see `fp8`.
    scale: bfloat16 (N, K / `group_of(K)`): the factor on the integers of a group; or float32 (N, 1): that on a row of e4m3.
    """

    weight: Tensor
    scale: Tensor

    def restored(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (N, K)."""
        return plain.dequantise(self.weight, self.scale, dtype)


def group_of(width: int) -> int:
    """The size of a group in rows of `width` values: the largest divisor up to `GROUP`."""
    return max(size for size in range(1, min(width, GROUP) + 1) if width % size == 0)


def rounded_names(names: Iterable[str], network: str) -> set[str]:
    """The names of the tensors that are rounded to 8 bits.

    Not those of the last ResBlock of a UNet: its errors reach the prediction whole.

    Args:
        names: the published names of all tensors of the network.
        network: the component.
    """
    if network not in NETWORKS:
        return set()
    chosen = {name for name in names if NAMES.fullmatch(name)}
    places = {name: (int(match[1]), int(match[2])) for name in chosen if (match := LAST.fullmatch(name))}
    last = max(places.values(), default=None)
    return {name for name in chosen if name not in places or places[name] != last}


def quantise(matrix: Tensor) -> EightBits:
    """Round a matrix (N, K) of floating point to 8 bits. Gives the same bits on every device.

    The largest value of a group becomes 127 or -127. Scales are rounded to bfloat16 first, so the integers fit to them.
    """
    groups = matrix.float().unflatten(1, (-1, group_of(matrix.shape[1])))
    scale = (torch.linalg.vector_norm(groups, torch.inf, dim=2) / LARGEST).bfloat16()
    # A group of zeros, or of values that bfloat16 has no scale for, has the scale 0.
    factors = torch.where(scale > 0, scale.float(), torch.inf)
    # In place: while networks are loaded, memory may be short.
    weight = groups.div(factors.unsqueeze(2)).round_().clamp_(-LARGEST, LARGEST)
    return EightBits(weight.flatten(1).to(torch.int8), scale)


class EightBitLinear(UsesKernels, StoredLinear):
    """A Linear layer with a weight in 8 bits.

    Parameters: `weight` and `weight_scale`, see `EightBits`, and `bias` in the dtype in which it computes.

    Args:
        layer: a Linear layer with a bias, which is kept. Its weight only gives the shape: that of this layer has no values yet.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        empty = self.empty(*layer.weight.shape, layer.weight.device)
        self.weight, self.weight_scale = (nn.Parameter(one, requires_grad=False) for one in empty)
        self.bias = layer.bias
        self.train(layer.training)

    @staticmethod
    def empty(rows: int, width: int, device: torch.device) -> EightBits:
        """A matrix (rows, width) without values."""
        return EightBits(
            torch.empty(rows, width, dtype=torch.int8, device=device),
            torch.empty(rows, width // group_of(width), dtype=torch.bfloat16, device=device),
        )

    def matrix(self, first: int = 0, last: int | None = None) -> Tensor:
        """See `StoredLinear.matrix`."""
        return self.kernels.dequantise(self.weight[first:last], self.weight_scale[first:last], self.dtype)


def scale_of(name: str) -> str:
    """The name of the scale that belongs to the weight of this name."""
    return f"{name.removesuffix('weight')}{SCALE}"


def is_in_8_bits(name: str, names: Container[str]) -> bool:
    """Whether a tensor, among those of these names, is a weight in 8 bits, or the scale of one."""
    return name.endswith(SCALE) or scale_of(name) in names


def in_float(weight: Tensor | EightBits) -> Tensor:
    """A weight in floating point; one in 8 bits in float32, exactly."""
    return weight.restored(torch.float32) if isinstance(weight, EightBits) else weight
