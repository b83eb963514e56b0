"""Products of numbers in 8-bit floating point, e4m3, on any device.

Both operands are e4m3. torch multiplies them fastest with one scale for a whole operand, so the scales of rows and columns are
left to the kernel that reads the product next. A product without scales is below 448**2 K, which bfloat16 holds.

e4m3 has 3 bits of mantissa from 2**-6 to 448. How exactly a scale fits the values matters little: in the miniature, scales 256
times too large change no error of a prediction. So no pass over activations looks for their largest value.
"""

import functools
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


def multiply(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T, without scales.

    Args:
        x: e4m3 (..., K), contiguous.
        weight: e4m3 (N, K), contiguous.
        dtype: of the result. bfloat16 on a GPU.

    Returns:
        (..., N), contiguous.
    """
    if not x.is_cuda:
        return _multiply_in_float32(x, weight).to(dtype)
    one = _constant(x.device, 1.0, 1).view(())
    made = torch._scaled_mm(
        x.view(-1, x.shape[-1]),
        weight.t(),
        scale_a=one,
        scale_b=one,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return made.view(*x.shape[:-1], -1)


def multiply_columns(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype, factor: float = 1.0
) -> Tensor:
    """factor * (x @ weight.T) * scale + bias, see `multiply`.

    Args:
        scale: float32 (N, 1), of each row of the weight.
        bias: (N,), in `dtype`.
        factor: of the whole product.
    """
    if not x.is_cuda:
        return (_multiply_in_float32(x, weight) * (factor * scale.view(-1)) + bias).to(dtype)
    rows = x.view(-1, x.shape[-1])
    made = torch._scaled_mm(
        rows,
        weight.t(),
        scale_a=_constant(x.device, factor, len(rows)),
        scale_b=scale.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return made.view(*x.shape[:-1], -1)


def _multiply_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    # torch._scaled_mm on a CPU has the same result, in 1.7 times the time, and has no scales of rows.
    return F.linear(x.float(), weight.float())


def _constant(device: torch.device, value: float, rows: int) -> Tensor:
    """float32 (rows, 1), each of this value. It keeps its address, for CUDA graphs."""
    return _constants(device, value, 1 << (rows - 1).bit_length())[:rows]


@functools.cache
def _constants(device: torch.device, value: float, rows: int) -> Tensor:
    # From the host, so that it is there on every stream when this returns.
    return torch.full((rows, 1), value, dtype=torch.float32).to(device)
