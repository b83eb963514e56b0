"""Triton kernels for the operations of Stages A, B and C that are bound by memory traffic and kernel launches.

The functions are those of `plain`, which describes their arguments. They are for inference, without gradients. Each kernel
reads its data once and computes in float32. Matrix products are left to cuBLAS, which was 1.0 to 1.9 times as fast for these
shapes as the best of 20 Triton variants (H100). Kernels are specialised by width and dtype, not by a picture's size, so a new
size compiles nothing. Programmatic dependent launch, which starts a kernel before the previous one has ended, gained 0.6% and
is not used.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import driver

from cascade.kernels import compiled, plain
from cascade.kernels import e4m3 as _e4m3
from cascade.kernels.layers import is_hooked, is_ordinary, is_readable
from cascade.kernels.plain import linear as linear
from cascade.kernels.stream import Stream

compiled.use_launchers()

EPS = tl.constexpr(1e-6)
LARGEST = tl.constexpr(_e4m3.LARGEST)
SMALLEST = tl.constexpr(plain.SMALLEST)
# Minimum number of programs of a reduction: several per multiprocessor of the largest GPUs.
PROGRAMS = 512
LOG2E = 1.4426950408889634
# Number of queries from which attention takes larger blocks.
LARGE_ATTENTION = 2304
# Bytes of hidden activations of Stage A's MLPs that are computed at a time, so that they stay in the L2 cache of a large GPU.
# A whole picture of 1024x1024 has 384 MiB.
HIDDEN = 32 * 2**20


def _power(value: int) -> int:
    return triton.next_power_of_2(value)


@triton.jit
def _settled(x, bias, scale, shift, HAS_BIAS: tl.constexpr, HAS_AFFINE: tl.constexpr):
    if HAS_BIAS:
        x += bias
    if HAS_AFFINE:
        x = x * (1 + scale) + shift
    return x


@compiled.jit(do_not_specialize=["rows_per_sample"])
def _norm(
    x_ptr, bias_ptr, scale_ptr, shift_ptr, ahead_ptr, product_ptr, of_samples_ptr, settled_ptr, normed_ptr,
    rows_per_sample, C, affine_row,
    HAS_BIAS: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_AHEAD: tl.constexpr, HAS_PRODUCT: tl.constexpr,
    FACTOR: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, CB)
    inside = column < C
    x = tl.load(x_ptr + row * C + column, mask=inside, other=0.0)
    if HAS_PRODUCT:
        product = tl.load(product_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
        x += product * tl.load(of_samples_ptr + row // rows_per_sample)
    bias = x
    scale = x
    shift = x
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_AFFINE:
        of_sample = (row // rows_per_sample) * affine_row + column
        scale = tl.load(scale_ptr + of_sample, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + of_sample, mask=inside, other=0.0)
    x = _settled(x, bias, scale, shift, HAS_BIAS, HAS_AFFINE)
    centred = tl.where(inside, x - tl.sum(tl.where(inside, x, 0.0)) / C, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / C + EPS)
    if FACTOR != 1:
        normed *= FACTOR
    tl.store(normed_ptr + row * C + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)
    if HAS_AHEAD:
        x += tl.load(ahead_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS or HAS_AFFINE or HAS_AHEAD or HAS_PRODUCT:
        tl.store(settled_ptr + row * C + column, x, mask=inside)


def norm(
    stream: Stream, dtype: torch.dtype, next_linear: nn.Module | None = None, *, e4m3: bool = False
) -> tuple[Stream, Tensor]:
    """See `plain.norm`. Adds the bias of `next_linear` early, so that cuBLAS can add its product to the stream in place."""
    x, bias, scale, shift, product = stream
    ahead = next_linear.bias if next_linear is not None and _accumulates(next_linear, dtype) else None
    batch, height, width, channels = x.shape
    changes = any(change is not None for change in (bias, scale, ahead, product))
    settled = torch.empty_like(x) if changes else x
    normed = torch.empty_like(x, dtype=_e4m3.E4M3 if e4m3 else dtype)
    # With a product, 16 warps take 8.2 us for Stage C, and 4 take 9.7; without one, 8.0 and 7.3 (H100).
    warps = 1 if channels <= 256 else 4 if product is None else max(4, _power(channels) // 128)
    _norm[(batch * height * width,)](
        x, bias, scale, shift, ahead, *(product or (None, None)), settled, normed,
        height * width, channels, 0 if scale is None else scale.stride(0),
        HAS_BIAS=bias is not None, HAS_AFFINE=scale is not None, HAS_AHEAD=ahead is not None,
        HAS_PRODUCT=product is not None, FACTOR=_e4m3.norm_factor(channels) if e4m3 else 1.0,
        CB=_power(channels), num_warps=warps,
    )  # fmt: skip
    return Stream(settled), normed


def add_linear(stream: Stream, hidden: Tensor, layer: nn.Module, *, after_norm: bool = False) -> Stream:
    """See `plain.add_linear`. Adds the product to the stream in place."""
    if not _accumulates(layer, hidden.dtype):
        return plain.add_linear(stream, hidden, layer)
    return plain.accumulate(stream, hidden, layer, bias_added=after_norm)


def _is_complete(layer: nn.Module) -> bool:
    """Whether a layer is ordinary and has a bias."""
    return is_ordinary(layer) and layer.bias is not None


def _accumulates(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether cuBLAS can add the layer's product with activations of this dtype to a float32 stream."""
    return dtype in (torch.bfloat16, torch.float16) and is_readable(layer, dtype)


@triton.jit
def _spread(value, j: tl.constexpr, left, middle, right, first, second, third, fourth):
    """Add pixel j of six neighbours in a line, weighted by one row of the kernel, to the outputs of the four middle pixels."""
    if j < 3:
        first += value * (left if j == 0 else (middle if j == 1 else right))
    if j >= 1 and j < 4:
        second += value * (left if j == 1 else (middle if j == 2 else right))
    if j >= 2 and j < 5:
        third += value * (left if j == 2 else (middle if j == 3 else right))
    if j >= 3:
        fourth += value * (left if j == 3 else (middle if j == 4 else right))
    return first, second, third, fourth


@triton.jit
def _normed_four(first, second, third, fourth, inside, C, FACTOR: tl.constexpr = 1.0):
    """LayerNorm of four vectors (CB,), in one reduction, times FACTOR."""
    four = tl.join(tl.join(first, second), tl.join(third, fourth))
    mean = tl.sum(tl.where(inside[:, None, None], four, 0.0), axis=0) / C
    four = tl.where(inside[:, None, None], four - mean[None, :, :], 0.0)
    size = tl.rsqrt(tl.sum(four * four, axis=0) / C + EPS)
    if FACTOR != 1:
        size *= FACTOR
    four = four * size[None, :, :]
    low, high = tl.split(four)
    first, second = tl.split(low)
    third, fourth = tl.split(high)
    return first, second, third, fourth


@compiled.jit(do_not_specialize=["H", "W", "columns"])
def _depthwise_norm(
    x_ptr, before_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, skip_ptr, settled_ptr, normed_ptr,
    H, W, C, columns, affine_row, weight_channel, weight_tap,
    HAS_BEFORE: tl.constexpr, HAS_AFFINE: tl.constexpr, HAS_SKIP: tl.constexpr, FACTOR: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """One program computes four neighbouring pixels of a line, all channels, and reads each of their 18 input pixels once."""
    block = tl.program_id(0)
    sample = block // (H * columns)
    y = block // columns % H
    left = block % columns * 4
    column = tl.arange(0, CB)
    in_channels = column < C
    before = tl.zeros((CB,), tl.float32)
    scale = before
    shift = before
    if HAS_BEFORE:
        before = tl.load(before_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    if HAS_AFFINE:
        scale = tl.load(scale_ptr + sample * affine_row + column, mask=in_channels, other=0.0)
        shift = tl.load(shift_ptr + sample * affine_row + column, mask=in_channels, other=0.0)
    a = tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    b, c, d = a, a, a
    line = sample.to(tl.int64) * H + y
    for i in tl.static_range(3):
        taps = weight_ptr + column * weight_channel + 3 * i * weight_tap
        w0 = tl.load(taps, mask=in_channels, other=0.0).to(tl.float32)
        w1 = tl.load(taps + weight_tap, mask=in_channels, other=0.0).to(tl.float32)
        w2 = tl.load(taps + 2 * weight_tap, mask=in_channels, other=0.0).to(tl.float32)
        in_line = in_channels & (y + i >= 1) & (y + i <= H)
        pixel = (line + i - 1) * W + left - 1
        for j in tl.static_range(6):
            inside = in_line & (left + j >= 1) & (left + j <= W)
            place = (pixel + j) * C + column
            value = tl.load(x_ptr + place, mask=inside, other=0.0)
            value = _settled(value, before, scale, shift, HAS_BEFORE, HAS_AFFINE)
            if HAS_BEFORE or HAS_AFFINE:
                value = tl.where(inside, value, 0.0)
                if i == 1 and j >= 1 and j <= 4:
                    tl.store(settled_ptr + place, value, mask=inside)
            a, b, c, d = _spread(value, j, w0, w1, w2, a, b, c, d)
    a, b, c, d = _normed_four(a, b, c, d, in_channels, C, FACTOR)
    row = 2 * C if HAS_SKIP else C
    pixel = line * W + left
    for j in tl.static_range(4):
        inside = in_channels & (left + j < W)
        value = a if j == 0 else (b if j == 1 else (c if j == 2 else d))
        out = normed_ptr + (pixel + j) * row + column
        tl.store(out, value.to(normed_ptr.dtype.element_ty), mask=inside)
        if HAS_SKIP:
            skip = tl.load(skip_ptr + (pixel + j) * C + column, mask=inside, other=0.0)
            tl.store(out + C, skip.to(normed_ptr.dtype.element_ty), mask=inside)


def depthwise_norm(
    stream: Stream, convolution: nn.Module, dtype: torch.dtype, skip: Tensor | None = None, *, e4m3: bool = False
) -> tuple[Stream, Tensor]:
    """See `plain.depthwise_norm`."""
    # A skip connection may exceed 65504, the largest float16.
    if not _is_served(convolution) or (skip is not None and dtype == torch.float16):
        return plain.depthwise_norm(stream, convolution, dtype, skip, e4m3=e4m3)
    if stream.product is not None:  # not in the published networks, where `norm` reads it
        stream = Stream(stream.settle())
    x, before, scale, shift, _ = stream
    weight, bias = convolution.weight, convolution.bias
    batch, height, width, channels = x.shape
    changes = before is not None or scale is not None
    settled = torch.empty_like(x) if changes else x
    normed = x.new_empty(
        batch, height, width, channels * (1 if skip is None else 2), dtype=_e4m3.E4M3 if e4m3 else dtype
    )
    columns = triton.cdiv(width, 4)
    # On an H100, 8 warps with the 173 to 183 registers that they need take 11.5 us for Stage C, and 11.4 in e4m3. 16 warps with
    # 64 registers, which spill, take 13.1, and 16.5 in e4m3. Pending operations of the stream need still more registers.
    padded = _power(channels)
    warps, registers = (8, None) if padded > 1024 and not changes else (max(4, padded // 128), 128)
    _depthwise_norm[(batch * height * columns,)](
        x, before, scale, shift, weight, bias, skip, settled, normed,
        height, width, channels, columns,
        0 if scale is None else scale.stride(0), weight.stride(0), weight.stride(3),
        HAS_BEFORE=before is not None, HAS_AFFINE=scale is not None, HAS_SKIP=skip is not None,
        FACTOR=_e4m3.norm_factor(channels) if e4m3 else 1.0, CB=padded, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return Stream(settled), normed


def _is_served(convolution: nn.Module) -> bool:
    """Whether the kernels support this convolution: ordinary, with a bias, 3x3, and equal strides between all taps."""
    if not is_ordinary(convolution) or convolution.bias is None or convolution.kernel_size != (3, 3):
        return False
    return convolution.weight.stride(2) == 3 * convolution.weight.stride(3)


@triton.jit
def _tanh(x):
    """tanh by the GPU's own instruction. Its error is at most 2**-11, a quarter of bfloat16's rounding."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gelu(x):
    """x * Phi(x), computed as x / 2 * (1 + tanh(x * p(x**2))) with a fitted p of degree 2, to within 2.7e-5.

    With libdevice's erf, or a polynomial for erf, the kernels would be bound by arithmetic instead of memory.
    """
    s = tl.minimum(x * x, 25.0)
    inner = x * (0.79749725 + s * (0.037015257 - s * 0.00035307545))
    half = 0.5 * x
    return half * _tanh(inner) + half


@compiled.jit(do_not_specialize=["tokens", "per_part"])
def _response_sizes(
    hidden_ptr, gamma_ptr, beta_ptr, squares_ptr, sizes_ptr, sums_ptr, bounds_ptr, counters_ptr,
    tokens, N, per_part,
    BOUNDED: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Compute each channel's norm over a sample's pixels, and for their mean, the sum of the norms in each block of channels.

    BOUNDED: also the two maxima of each block that bound what `_respond` makes of it, see `plain.gelu_response_e4m3`.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    sample = tl.program_id(2)
    parts = tl.num_programs(1)
    blocks = tl.num_programs(0)
    column = block * CB + tl.arange(0, CB)
    valid = column < N
    last = min(part * per_part + per_part, tokens)
    rows = part * per_part + tl.arange(0, RB)
    at = hidden_ptr + (sample.to(tl.int64) * tokens + rows)[:, None] * N + column[None, :]
    acc = tl.zeros((RB, CB), tl.float32)
    value = tl.load(at, mask=(rows < last)[:, None] & valid[None, :], other=0.0)
    for _ in tl.range(0, per_part, RB):
        rows += RB
        at += RB * N
        # Loads the next rows while it computes these.
        coming = tl.load(at, mask=(rows < last)[:, None] & valid[None, :], other=0.0)
        value = _gelu(value.to(tl.float32))
        acc += value * value
        value = coming
    squares = tl.sum(acc, axis=0)
    is_last = True
    if parts > 1:
        tl.store(squares_ptr + (sample * parts + part) * N + column, squares, mask=valid)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + sample * blocks + block, 1, sem="acq_rel", scope="gpu")
        is_last = arrived == parts - 1
        if is_last:
            tl.store(counters_ptr + sample * blocks + block, 0)
            # In a fixed order, so that pictures are reproducible.
            squares = tl.zeros((CB,), tl.float32)
            for i in range(parts):
                place = squares_ptr + (sample * parts + i) * N + column
                squares += tl.load(place, mask=valid, other=0.0, cache_modifier=".cg")
    if is_last:
        sizes = tl.sqrt(squares)
        tl.store(sizes_ptr + sample * N + column, sizes, mask=valid)
        tl.store(sums_ptr + sample * blocks + block, tl.sum(sizes))
        if BOUNDED:
            gamma = tl.load(gamma_ptr + column, mask=valid, other=0.0).to(tl.float32)
            beta = tl.load(beta_ptr + column, mask=valid, other=0.0).to(tl.float32)
            bounds_ptr += 2 * sample * blocks + block
            tl.store(bounds_ptr, tl.max(sizes + tl.abs(beta)))
            tl.store(bounds_ptr + blocks, tl.max(tl.abs(gamma) * sizes * sizes))


@triton.jit
def _sum_and_maxima(total, first, second, other, other_first, other_second):
    """Combine two triples of a sum and two maxima, for `tl.reduce`."""
    return total + other, tl.maximum(first, other_first), tl.maximum(second, other_second)


@compiled.jit(do_not_specialize=["tokens", "sums"])
def _respond(
    hidden_ptr, gamma_ptr, beta_ptr, sizes_ptr, sums_ptr, bounds_ptr, of_samples_ptr, out_ptr,
    tokens, N, sums,
    BOUNDED: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2)
    column = tl.program_id(0) * CB + tl.arange(0, CB)
    valid = column < N
    rows = tl.program_id(1) * RB + tl.arange(0, RB)
    inside = (rows < tokens)[:, None] & valid[None, :]
    at = (sample.to(tl.int64) * tokens + rows)[:, None] * N + column[None, :]
    value = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    every = tl.arange(0, SUMS)
    sizes = tl.load(sums_ptr + sample * sums + every, mask=every < sums, other=0.0)
    if BOUNDED:
        bounds_ptr += 2 * sample * sums + every
        first = tl.load(bounds_ptr, mask=every < sums, other=0.0)
        second = tl.load(bounds_ptr + sums, mask=every < sums, other=0.0)
        # One reduction instead of three, so that threads wait for each other once.
        total, first, second = tl.reduce((sizes, first, second), 0, _sum_and_maxima)
    else:
        total = tl.sum(sizes)
    mean = total / N
    own = tl.load(sizes_ptr + sample * N + column, mask=valid, other=0.0)
    gamma = tl.load(gamma_ptr + column, mask=valid, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + column, mask=valid, other=0.0).to(tl.float32)
    factor = 1 + gamma * (own / (mean + EPS))
    if BOUNDED:
        bound = tl.maximum(first + second / (mean + EPS), SMALLEST)
        factor *= LARGEST / bound
        beta *= LARGEST / bound
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(of_samples_ptr + sample, bound / LARGEST)
    value = _gelu(value.to(tl.float32)) * factor[None, :] + beta[None, :]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _counters(device: torch.device, stream: int) -> Tensor:
    """Counters with which the programs of `_response_sizes` find the last of them.

    One tensor per stream (the address of CUDA's) suffices, because kernels on one stream run one after the other.
    """
    return torch.zeros(1 << 16, dtype=torch.int32, device=device)


def gelu_response(hidden: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """See `plain.gelu_response`. Works in place."""
    hidden = hidden.contiguous()  # a replaced layer may return other strides
    _gelu_response(hidden, gamma, beta, hidden, None)
    return hidden


def gelu_response_e4m3(hidden: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """See `plain.gelu_response_e4m3`."""
    out, of_samples = torch.empty_like(hidden, dtype=_e4m3.E4M3), hidden.new_empty(len(hidden), dtype=torch.float32)
    _gelu_response(hidden, gamma, beta, out, of_samples)
    return out, of_samples


def _gelu_response(hidden: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, of_samples: Tensor | None) -> None:
    """Write to `out`, which may be `hidden`; and samples' scales, if they are asked for. hidden: contiguous."""
    batch, height, width, channels = hidden.shape
    # On an H100, 32 rows at a time with 64 registers take 8.9 us for Stage C in e4m3, and 29.5 for four pictures; 64 rows with
    # the 72 registers that they need take 9.8 and 37.6.
    tokens, block, rows = height * width, 64, 32
    blocks = triton.cdiv(channels, block)
    parts = max(1, min(triton.cdiv(PROGRAMS, blocks * batch), triton.cdiv(tokens, 4 * rows)))
    squares = hidden.new_empty(batch, parts, channels, dtype=torch.float32)
    sizes = hidden.new_empty(batch, channels, dtype=torch.float32)
    sums = hidden.new_empty(batch, blocks, dtype=torch.float32)
    bounded = of_samples is not None
    bounds = hidden.new_empty(batch, 2, blocks, dtype=torch.float32) if bounded else None
    counters = _counters(hidden.device, driver.active.get_current_stream(driver.active.get_current_device()))
    _response_sizes[(blocks, parts, batch)](
        hidden, gamma, beta, squares, sizes, sums, bounds, counters, tokens, channels, triton.cdiv(tokens, parts),
        BOUNDED=bounded, RB=rows, CB=block, num_warps=4, maxnreg=64,
    )  # fmt: skip
    wide = 256 if bounded else 128  # in e4m3, 10.4 us instead of 10.9 for Stage C (H100)
    _respond[(triton.cdiv(channels, wide), triton.cdiv(tokens, 32), batch)](
        hidden, gamma, beta, sizes, sums, bounds, of_samples, out, tokens, channels, blocks,
        BOUNDED=bounded, RB=32, CB=wide, SUMS=_power(blocks), num_warps=4,
    )  # fmt: skip


@triton.jit
def _attend(
    q, acc, norm, top, key_ptr, value_ptr, bias_ptr, row, tokens, hidden, hidden_tokens, factor, root,
    D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """More keys and values for the running softmax of a block of queries: whole blocks, or (TAIL) what is left of them.

    tokens: number of keys, without those that are left out: `hidden_tokens` from key `hidden` on.
    """
    d = tl.arange(0, DB)
    whole = tokens // BN * BN
    for first in tl.range(whole if TAIL else 0, tokens if TAIL else whole, BN, num_stages=1 if TAIL else STAGES):
        n = first + tl.arange(0, BN)
        inside = (d < D)[None, :]
        if TAIL:
            inside = inside & (n < tokens)[:, None]
        at = n
        if HIDES:
            at += tl.where(n >= hidden, hidden_tokens, 0)
        place = at[:, None] * row + d[None, :]
        score = tl.dot(q, tl.load(key_ptr + place, mask=inside, other=0.0).T)
        if BIASED:
            score += tl.load(bias_ptr + at, mask=n < tokens, other=0.0)[None, :] * root
        if TAIL:
            score = tl.where((n < tokens)[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1) * factor)
        weight = tl.exp2(score * factor - higher[:, None])
        fade = tl.exp2(top - higher)
        norm = norm * fade + tl.sum(weight, axis=1)
        value = tl.load(value_ptr + place, mask=inside, other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None])
        top = higher
    return acc, norm, top


@compiled.jit(do_not_specialize=["own", "queries", "context"])
def _attention(
    q_ptr, k_ptr, v_ptr, key_ptr, value_ptr, bias_ptr, hidden_ptr, out_ptr,
    own, queries, context, factor, root,
    q_row, own_row, key_batch, key_head, key_row, out_row,
    D: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    BIASED: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    hidden = 0
    hidden_tokens = 0
    if HIDES:
        hidden = tl.load(hidden_ptr + 2 * sample)
        hidden_tokens = tl.load(hidden_ptr + 2 * sample + 1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, DB)
    inside = (m < queries)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + (sample * queries + m)[:, None] * q_row + head * D + d[None, :], mask=inside, other=0.0)
    acc = tl.zeros((BM, DB), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    at = sample * own * own_row + head * D
    acc, norm, top = _attend(
        q, acc, norm, top, k_ptr + at, v_ptr + at, bias_ptr, own_row, own, 0, 0, factor, root,
        D, DB, BN, False, STAGES, False, False,
    )  # fmt: skip
    acc, norm, top = _attend(
        q, acc, norm, top, k_ptr + at, v_ptr + at, bias_ptr, own_row, own, 0, 0, factor, root,
        D, DB, BN, True, STAGES, False, False,
    )  # fmt: skip
    at = sample * key_batch + head * key_head
    key_ptr += at
    value_ptr += at
    if BIASED:
        bias_ptr += sample * context
    context -= hidden_tokens
    acc, norm, top = _attend(
        q, acc, norm, top, key_ptr, value_ptr, bias_ptr, key_row, context, hidden, hidden_tokens, factor, root,
        D, DB, BN, False, STAGES, BIASED, HIDES,
    )  # fmt: skip
    acc, norm, top = _attend(
        q, acc, norm, top, key_ptr, value_ptr, bias_ptr, key_row, context, hidden, hidden_tokens, factor, root,
        D, DB, BN, True, STAGES, BIASED, HIDES,
    )  # fmt: skip
    acc = acc / norm[:, None]
    out = (sample * queries + m)[:, None] * out_row + head * D + d[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def attention(
    query: Tensor,
    own_key: Tensor | None,
    own_value: Tensor | None,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """See `plain.attention`.

    Hidden keys cost nothing: a program reads their number, and steps over them. So a sample has exactly the result that
    it has without them.
    """
    batch, queries, channels = query.shape
    _, heads, context, size = key.shape
    own_pair = () if own_key is None else (own_key, own_value)
    # Loads are of 16 bytes; and a replaced layer may return other strides.
    strides_fit = all(_has_even_rows(x) for x in (query, *own_pair)) and key.stride() == value.stride()
    if size % 8 or dropout or not strides_fit or key.stride(3) != 1 or len({x.stride(1) for x in own_pair}) > 1:
        return plain.attention(query, own_key, own_value, key, value, dropout, bias, hidden)
    out = query.new_empty(batch, queries, channels)
    own = 0 if own_key is None else own_key.shape[1]
    own_row = 0 if own_key is None else own_key.stride(1)
    if own_key is None:
        own_key = own_value = query  # is not read
    # Of scores, in float32: had the queries been scaled, and rounded again, the result would be a quarter less exact. With
    # log2(e), for exp2 instead of exp.
    factor = size**-0.5 * LOG2E
    # On an H100 the fastest of eleven shapes, at 576 to 2116 queries; cuDNN's kernel takes 15 to 30% longer. Larger blocks take
    # 5% less time at 2304 queries, and 10% at 9216. Both give the same bits.
    block, warps = (128, 8) if queries >= LARGE_ATTENTION else (64, 4)
    bias, hidden = (None if given is None else given.contiguous() for given in (bias, hidden))
    _attention[(triton.cdiv(queries, block), heads, batch)](
        query, own_key, own_value, key, value, bias, hidden, out,
        own, queries, context, factor, size**0.5,
        query.stride(1), own_row, key.stride(0), key.stride(1), key.stride(2), out.stride(1),
        D=size, DB=max(16, _power(size)), BM=block, BN=64, STAGES=3,
        BIASED=bias is not None, HIDES=hidden is not None, num_warps=warps,
    )  # fmt: skip
    return out


def _has_even_rows(x: Tensor) -> bool:
    """Whether all rows of (B, T, C) are equally far apart, also from one sample to the next, with channels side by side."""
    return x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))


@triton.jit
def _add_map(acc, weight_ptr, bias_ptr, times_ptr, n, e, N, E):
    """Add output channels n of one condition's mapper, applied to its embedding of length E."""
    acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    embedding = tl.load(times_ptr + e, mask=e < E, other=0.0)
    inside = (n < N)[:, None] & (e < E)[None, :]
    place = n.to(tl.int64)[:, None] * E + e[None, :]
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return acc + tl.sum(weight * embedding[None, :], axis=1)


@compiled.jit()
def _timestep_maps(
    weight0_ptr, bias0_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, times_ptr, out_ptr,
    N, E,
    CONDITIONS: tl.constexpr, CB: tl.constexpr, EB: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1)
    samples = tl.num_programs(1)
    n = tl.program_id(0) * CB + tl.arange(0, CB)
    e = tl.arange(0, EB)
    acc = tl.zeros((CB,), tl.float32)
    acc = _add_map(acc, weight0_ptr, bias0_ptr, times_ptr + sample * E, n, e, N, E)
    if CONDITIONS > 1:
        acc = _add_map(acc, weight1_ptr, bias1_ptr, times_ptr + (samples + sample) * E, n, e, N, E)
    if CONDITIONS > 2:
        acc = _add_map(acc, weight2_ptr, bias2_ptr, times_ptr + (2 * samples + sample) * E, n, e, N, E)
    tl.store(out_ptr + sample.to(tl.int64) * N + n, acc, mask=n < N)


def timestep_maps(mappers: Sequence[nn.Module], times: Tensor, dtype: torch.dtype) -> Tensor:
    """See `plain.timestep_maps`. The embeddings stay float32."""
    if len(mappers) > 3 or not all(_is_complete(mapper) and mapper.weight.is_contiguous() for mapper in mappers):
        return plain.timestep_maps(mappers, times, dtype)
    conditions, samples, length = times.shape
    channels = mappers[0].out_features
    out = times.new_empty(samples, channels)
    # The kernel reads only CONDITIONS mappers. The first mapper fills the other parameters.
    weights = [
        tensor for mapper in (*mappers, *mappers[:1] * (3 - conditions)) for tensor in (mapper.weight, mapper.bias)
    ]
    _timestep_maps[(triton.cdiv(channels, 64), samples)](
        *weights, times, out, channels, length, CONDITIONS=conditions, CB=64, EB=_power(length), num_warps=4
    )
    return out


@compiled.jit(do_not_specialize=["rows"])
def _row_statistics(x_ptr, statistics_ptr, rows, C, P: tl.constexpr, CB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    column = tl.arange(0, CB)
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    tl.store(statistics_ptr + 2 * row, mean, mask=row < rows)
    tl.store(statistics_ptr + 2 * row + 1, tl.rsqrt(tl.sum(centred * centred, axis=1) / C + EPS), mask=row < rows)


@compiled.jit(do_not_specialize=["H", "W", "columns"])
def _mix(
    x_ptr, statistics_ptr, gammas_ptr, weight_ptr, bias_ptr, ahead_ptr, mixed_ptr, normed_ptr,
    H, W, C, columns, weight_channel, weight_tap,
    CB: tl.constexpr,
):  # fmt: skip
    """One program computes four neighbouring pixels of a line, with replicated edges."""
    block = tl.program_id(0)
    sample = block // (H * columns)
    y = block // columns % H
    left = block % columns * 4
    column = tl.arange(0, CB)
    in_channels = column < C
    a = tl.zeros((CB,), tl.float32)
    b, c, d = a, a, a
    xa, xb, xc, xd = a, a, a, a
    total = a
    for i in tl.static_range(3):
        taps = weight_ptr + column * weight_channel + 3 * i * weight_tap
        w0 = tl.load(taps, mask=in_channels, other=0.0).to(tl.float32)
        w1 = tl.load(taps + weight_tap, mask=in_channels, other=0.0).to(tl.float32)
        w2 = tl.load(taps + 2 * weight_tap, mask=in_channels, other=0.0).to(tl.float32)
        total += w0 + w1 + w2
        line = (sample * H + min(max(y + i - 1, 0), H - 1)).to(tl.int64) * W
        for j in tl.static_range(6):
            pixel = line + min(max(left + j - 1, 0), W - 1)
            value = tl.load(x_ptr + pixel * C + column, mask=in_channels, other=0.0).to(tl.float32)
            if i == 1:
                xa = value if j == 1 else xa
                xb = value if j == 2 else xb
                xc = value if j == 3 else xc
                xd = value if j == 4 else xd
            value = (value - tl.load(statistics_ptr + 2 * pixel)) * tl.load(statistics_ptr + 2 * pixel + 1)
            a, b, c, d = _spread(value, j, w0, w1, w2, a, b, c, d)
    scale1 = 1 + tl.load(gammas_ptr).to(tl.float32)
    shift1 = tl.load(gammas_ptr + 1).to(tl.float32)
    gate1 = tl.load(gammas_ptr + 2).to(tl.float32)
    scale2 = 1 + tl.load(gammas_ptr + 3).to(tl.float32)
    shift2 = tl.load(gammas_ptr + 4).to(tl.float32)
    gate2 = tl.load(gammas_ptr + 5).to(tl.float32)
    # The norm's scale and shift are equal for all pixels and channels, so they can be applied after the convolution.
    constant = shift1 * total + tl.load(bias_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    xa += gate1 * (scale1 * a + constant)
    xb += gate1 * (scale1 * b + constant)
    xc += gate1 * (scale1 * c + constant)
    xd += gate1 * (scale1 * d + constant)
    a, b, c, d = _normed_four(xa, xb, xc, xd, in_channels, C)
    ahead = gate2 * tl.load(ahead_ptr + column, mask=in_channels, other=0.0).to(tl.float32)
    pixel = (sample * H + y).to(tl.int64) * W + left
    for j in tl.static_range(4):
        inside = in_channels & (left + j < W)
        normed = a if j == 0 else (b if j == 1 else (c if j == 2 else d))
        mixed = xa if j == 0 else (xb if j == 1 else (xc if j == 2 else xd))
        place = (pixel + j) * C + column
        tl.store(normed_ptr + place, (normed * scale2 + shift2).to(normed_ptr.dtype.element_ty), mask=inside)
        tl.store(mixed_ptr + place, (mixed + ahead).to(mixed_ptr.dtype.element_ty), mask=inside)


def _mixed(x: Tensor, gammas: Tensor, convolution: nn.Conv2d, last: nn.Linear) -> tuple[Tensor, Tensor]:
    """x (B, H, W, C) plus the convolution's branch and the gated bias of the MLP's last layer; and the MLP's input."""
    weight = convolution.weight
    batch, height, width, channels = x.shape
    rows = batch * height * width
    statistics = x.new_empty(rows, 2, dtype=torch.float32)
    _row_statistics[(triton.cdiv(rows, 4),)](x, statistics, rows, channels, P=4, CB=_power(channels), num_warps=4)
    mixed, normed = torch.empty_like(x), torch.empty_like(x)
    columns = triton.cdiv(width, 4)
    _mix[(batch * height * columns,)](
        x, statistics, gammas, weight, convolution.bias, last.bias, mixed, normed,
        height, width, channels, columns, weight.stride(0), weight.stride(3),
        CB=_power(channels), num_warps=4, maxnreg=128,
    )  # fmt: skip
    return mixed, normed


def mixing_block(x: Tensor, gammas: Tensor, depthwise: nn.Module, channelwise: nn.Module) -> Tensor:
    """See `plain.mixing_block`."""
    if any(type(one) is not nn.Sequential or is_hooked(one) for one in (depthwise, channelwise)):
        return plain.mixing_block(x, gammas, depthwise, channelwise)
    convolution, first, last = depthwise[1], channelwise[0], channelwise[2]
    if not (_is_served(convolution) and _is_complete(first) and _is_complete(last)):
        return plain.mixing_block(x, gammas, depthwise, channelwise)
    x = x.permute(0, 2, 3, 1).contiguous()
    mixed, normed = _mixed(x, gammas, convolution, last)
    # Multiplied into the weight on the GPU. As cuBLAS's factor, the host would have to read the gate, and wait for the GPU.
    gated = (last.weight * gammas[5]).t()
    at_once = HIDDEN // (first.out_features * x.element_size())
    for rows, of_rows in zip(mixed.flatten(0, 2).split(at_once), normed.flatten(0, 2).split(at_once), strict=True):
        # cuBLAS computes GELU with tanh, to within 5e-4. That is less than bfloat16's rounding.
        hidden = torch._addmm_activation(first.bias, of_rows, first.weight.t(), use_gelu=True)
        torch.addmm(rows, hidden, gated, out=rows)
    return mixed.permute(0, 3, 1, 2)


@compiled.jit(do_not_specialize=["groups"])
def _dequantise(
    weight_ptr, scale_ptr, out_ptr, groups, GROUP: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one = tl.arange(0, PADDED)
    inside = (group < groups)[:, None] & (one < GROUP)[None, :]
    at = group[:, None] * GROUP + one[None, :]
    scale = tl.load(scale_ptr + group, mask=group < groups, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (weight * scale[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """See `plain.dequantise`. A group divides a row, so the groups of all rows follow one another as the weights do."""
    out = torch.empty_like(weight, dtype=dtype)
    groups = scale.numel()
    size = weight.numel() // groups
    block = max(4096 // _power(size), 1)
    _dequantise[(triton.cdiv(groups, block),)](
        weight, scale, out, groups, GROUP=size, PADDED=_power(size), BLOCK=block, num_warps=8
    )
    return out
