"""Weights in 8-bit floating point, e4m3, for products in e4m3, which GPUs that have them compute in less time than in bfloat16.

Each published matrix has one scale. It is stored for each row, because layers that are stacked have several. Activations become
e4m3 inside of the kernels that make them: norms and response norms, see `kernels.e4m3`. So these products have operands in
e4m3:

- q, k and v of the image's tokens;
- both layers of a ResBlock's MLP in levels with attention, which have most of the work of both stages.

In bfloat16 remain: ResBlocks with a skip connection, whose values have no bound; the last ResBlock, whose errors reach the
prediction whole; the attention's last layers, whose sum with the stream is free in bfloat16, but would be an operation of its
own here; and levels without attention. Why, with the counts: docs/experiments.md.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cascade.kernels.e4m3 import E4M3, LARGEST, MULTIPLE, multiply, multiply_columns, norm_factor
from cascade.kernels.layers import is_hooked
from cascade.networks.eight_bits import EightBitLinear, EightBits

# The published names of the layers of blocks that run at each step: in a level; of these, of its ResBlocks.
LAYER = re.compile(
    r"((?:down|up)_blocks\.\d+)\.\d+\.(?:channelwise\.[04]|attention\.to_[qkv]|attention\.to_out\.0)\.weight"
)
MLP = re.compile(r"(.*\.channelwise)\.[04]\.weight")
# Up to so many rows, products of a norm are faster with one scale; of the first layer of Stage C's MLPs, 1152 rows take 31.3 us
# instead of 34.1, but 4608 take 130 instead of 121 (H100).
FEW = 2048
LAST_OF_ATTENTION = ".attention.to_out.0.weight"


def quantise(matrix: Tensor) -> EightBits:
    """Round a matrix (N, K) of floating point to e4m3. Gives the same bits on every device.

    The largest value becomes 448 or -448.
    """
    # By a tensor: by a number, a GPU multiplies with its reciprocal, and rounds otherwise than a CPU.
    scale = torch.linalg.vector_norm(matrix.float(), torch.inf) / torch.tensor(LARGEST, device=matrix.device)
    # In place: while networks are loaded, memory may be short. A matrix of zeros has the scale 0.
    weight = matrix.float().div(torch.where(scale > 0, scale, torch.inf)).clamp_(-LARGEST, LARGEST)
    return EightBits(weight.to(E4M3), scale.repeat(len(matrix), 1))


def names_of_products(shapes: Mapping[str, Sequence[int]], rounded: Iterable[str]) -> set[str]:
    """The names of the weights whose products are computed in e4m3.

    Args:
        shapes: of all tensors of a network, by published name.
        rounded: `eight_bits.rounded_names`.
    """
    found = {name: match[1] for name in rounded if (match := LAYER.fullmatch(name))}
    with_attention = {level for name, level in found.items() if name.endswith(LAST_OF_ATTENTION)}
    return {
        name
        for name, level in found.items()
        if level in with_attention and not name.endswith(LAST_OF_ATTENTION) and _can_multiply(name, shapes)
    }


def is_step_invariant(name: str) -> bool:
    """Whether a weight of this published name is used once a picture, not at each step."""
    return LAYER.fullmatch(name) is None


def _can_multiply(name: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a weight's shape is one that can be multiplied, and that of a ResBlock without a skip connection."""
    match = MLP.fullmatch(name)
    if match:
        rows, width = shapes[f"{match[1]}.0.weight"]
        if tuple(shapes[f"{match[1]}.4.weight"]) != (width, rows):
            return False
    return all(side % MULTIPLE == 0 for side in shapes[name])


class Fp8Linear(EightBitLinear):
    """A Linear layer with a weight in e4m3, which multiplies activations in e4m3. Others are multiplied with its matrix.

    Parameters: as those of `EightBitLinear`.
    """

    @staticmethod
    def empty(rows: int, width: int, device: torch.device) -> EightBits:
        """See `EightBitLinear.empty`."""
        return EightBits(
            torch.empty(rows, width, dtype=E4M3, device=device),
            torch.empty(rows, 1, dtype=torch.float32, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) in the layer's dtype, or a norm in e4m3, times `norm_factor(K)`."""
        return super().forward(x) if x.dtype != E4M3 else self._of_norm(multiply_columns, x)

    def multiply(self, x: Tensor) -> Tensor:
        """`forward` of a norm in e4m3, for a layer whose matrix is one of the published ones, so that it has one scale."""
        few = x.numel() // self.in_features <= FEW
        return self._of_norm(multiply if few else multiply_columns, x)

    def product(self, x: Tensor) -> Tensor:
        """The product of the matrix with any x in e4m3, (..., K), without bias: (..., N). For a layer as in `multiply`."""
        return multiply(x, self.weight, self.weight_scale, None, self.dtype)

    def _of_norm(self, multiplied: Callable[..., Tensor], x: Tensor) -> Tensor:
        factor = 1 / norm_factor(self.in_features)
        return multiplied(x, self.weight, self.weight_scale, self.bias, self.dtype, factor)


def multiplies(*layers: nn.Module) -> bool:
    """Whether all of these layers can multiply activations in e4m3 now: `Fp8Linear` without hooks, and no gradients."""
    return not torch.is_grad_enabled() and all(type(one) is Fp8Linear and not is_hooked(one) for one in layers)
