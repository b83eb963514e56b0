"""Products of numbers in 8-bit floating point, e4m3, on any device.

Both operands are e4m3. torch multiplies them with one scale for each operand, or with one for each row and column, and which is
faster depends on the shape. Samples of a batch have scales of their own where the next kernel applies them.

e4m3 has 3 bits of mantissa from 2**-6 to 448. How exactly a scale fits the values matters little: in the miniature, scales 256
times too large change no error of a prediction. So no pass over activations looks for their largest value.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
# The compute capability from which GPUs multiply e4m3: Ada and Hopper.
CAPABILITY = (8, 9)
# torch's kernels for GPUs take rows of whole 16 bytes.
MULTIPLE = 16


def norm_factor(channels: int) -> float:
    """What a LayerNorm over `channels` is multiplied by before it becomes e4m3: a power of two.

    Such a norm, without learned scale and shift, has no value beyond sqrt(channels - 1). So the factor depends on nothing else,
    and a picture does not depend on its neighbours in the batch.
    """
    return 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(channels)))


def in_e4m3(x: Tensor) -> Tensor:
    """x in e4m3: values beyond 448 become 448, and values that are not finite NaN."""
    # Conversion makes NaN of what is beyond 464.
    return torch.where(x.isfinite(), x.clamp(-LARGEST, LARGEST), torch.nan).to(E4M3)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    """factor * scale * x @ weight.T + bias, with one scale.

    Args:
        x: e4m3 (..., K), contiguous.
        weight: e4m3 (N, K), contiguous.
        scale: float32 (N, 1), of each row of the weight. All are equal.
        bias: (N,), in `dtype`; None: zeros.
        dtype: of the result. bfloat16 on a GPU.
        factor: of the whole product.

    Returns:
        (..., N), contiguous.
    """
    if not x.is_cuda:
        return _multiply_in_float32(x, weight, scale, bias, dtype, factor)
    return _multiply(x, weight, _constant(x.device, factor, 1).view(()), scale[:1].view(()), bias, dtype)


def multiply_columns(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    """`multiply`, with a scale of its own for each row of the weight."""
    if not x.is_cuda:
        return _multiply_in_float32(x, weight, scale, bias, dtype, factor)
    rows = x.numel() // x.shape[-1]
    return _multiply(x, weight, _constant(x.device, factor, rows), scale.t(), bias, dtype)


def _multiply(
    x: Tensor, weight: Tensor, of_x: Tensor, of_weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    made = torch._scaled_mm(
        x.view(-1, x.shape[-1]),
        weight.t(),
        scale_a=of_x,
        scale_b=of_weight,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return made.view(*x.shape[:-1], -1)


def _multiply_in_float32(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, factor: float
) -> Tensor:
    # torch._scaled_mm on a CPU has the same result, in 1.7 times the time, and has no scales of rows.
    made = F.linear(x.float(), weight.float()) * (factor * scale.view(-1))
    return (made if bias is None else made + bias).to(dtype)


# By device, value and rows. Never freed: graphs have their addresses.
_constants: dict[tuple[torch.device, float, int], Tensor] = {}


def _constant(device: torch.device, value: float, rows: int) -> Tensor:
    """float32 (rows, 1), each of this value. It keeps its address, for CUDA graphs."""
    key = (device, value, 1 << (rows - 1).bit_length())
    if key not in _constants:
        # From the host, so that it is there on every stream when this returns. If several threads make one at the same time, all
        # use the first: a graph may have captured its address.
        _constants.setdefault(key, torch.full((key[2], 1), value, dtype=torch.float32).to(device))
    return _constants[key][:rows]
