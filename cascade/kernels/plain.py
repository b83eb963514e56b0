"""The blocks' functions in plain torch: any device, any dtype, differentiable. Also the reference for tests of `triton`.

Activations are (B, H, W, C), contiguous. Branches are computed in the weights' dtype, the residual stream in float32. With
float16 weights, values that enter or leave a branch without a normalisation are computed in float32, too: float16 ends at
65504, and a stream of 1e5 must stay exact.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.kernels.e4m3 import LARGEST, in_e4m3, norm_factor
from cascade.kernels.layers import has_float16_weights, in_float32, is_readable, matrix_of
from cascade.kernels.stream import Stream

EPS = 1e-6
# A bound of activations that are all zero.
SMALLEST = 1e-30


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, H, W, C), without learned scale or shift, in the dtype of `x`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def norm(
    stream: Stream, dtype: torch.dtype, next_linear: nn.Module | None = None, *, e4m3: bool = False
) -> tuple[Stream, Tensor]:
    """The settled stream, and its LayerNorm, (B, H, W, C).

    Args:
        stream: the residual stream.
        dtype: the weights' dtype, and that of the normalised result.
        next_linear: the layer whose output `add_linear` adds next. The returned stream may already contain its bias.
        e4m3: whether the result is e4m3 instead, times `norm_factor`.
    """
    x = stream.settle()
    normed = layer_norm(x)
    return Stream(x), in_e4m3(normed * norm_factor(x.shape[-1])) if e4m3 else normed.to(dtype)


def linear(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`layer` of x (B, H, W, K), with `x` in `dtype`. A float32 `x` stays float32 where `dtype` is float16."""
    if dtype == torch.float16 and x.dtype == torch.float32:
        return in_float32(layer, x)
    return layer(x.to(dtype))


def add_linear(stream: Stream, hidden: Tensor, layer: nn.Module, *, after_norm: bool = False) -> Stream:
    """A settled stream plus `layer(hidden)`. The given stream must not be used afterwards.

    Args:
        stream: the settled residual stream.
        hidden: (B, H, W, K), in the weights' dtype, or float32 with float16 weights.
        layer: a Linear, K -> C channels.
        after_norm: whether the stream is the result of `norm` with `layer` as `next_linear`.
    """
    if has_float16_weights(layer) and (hidden.dtype == torch.float32 or is_readable(layer)):
        if hidden.dtype == torch.float16 and hidden.is_cuda and not torch.is_grad_enabled():
            return accumulate(stream, hidden, layer)
        return Stream(stream.x + in_float32(layer, hidden.float()))
    return Stream(stream.x + layer(hidden))


def accumulate(stream: Stream, hidden: Tensor, layer: nn.Linear, *, bias_added: bool = False) -> Stream:
    """`add_linear` as part of the matrix product, in place: for layers in 16 bits, on a CUDA GPU, without gradients."""
    # The addition takes no time: a (1152, 2048, 2048) product takes 17 us with and without it (H100).
    rows = stream.x.view(-1, stream.x.shape[-1])
    if not rows.is_meta:  # there torch does not know out_dtype
        torch.addmm(rows, hidden.flatten(0, 2), matrix_of(layer).t(), out_dtype=torch.float32, out=rows)
    return Stream(stream.x, bias=None if bias_added else layer.bias)


def depthwise_norm(
    stream: Stream, convolution: nn.Module, dtype: torch.dtype, skip: Tensor | None = None, *, e4m3: bool = False
) -> tuple[Stream, Tensor]:
    """The settled stream, and the LayerNorm of its depthwise convolution.

    Args:
        stream: the residual stream.
        convolution: the depthwise convolution of (B, C, H, W).
        dtype: dtype of the weights and of the normalised result. With float16 and a skip connection, the result is float32.
        skip: float32 (B, H, W, C), appended to the channels after the norm.
        e4m3: whether the result is e4m3 instead, times `norm_factor`. Not with float16 or a skip connection.
    """
    x = stream.settle()
    if dtype == torch.float16:
        normed = layer_norm(in_float32(convolution, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return Stream(x), normed.to(dtype) if skip is None else torch.cat([normed, skip], dim=-1)
    normed = layer_norm(convolution(x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    if skip is not None:
        normed = torch.cat([normed, skip.to(normed.dtype)], dim=-1)
    return Stream(x), in_e4m3(normed.float() * norm_factor(x.shape[-1])) if e4m3 else normed


def gelu_response(hidden: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """GELU, then ConvNeXt V2's global response normalisation (Woo et al., arXiv 2301.00808) over H and W together.

    hidden: (B, H, W, C). It may be overwritten.
    gamma, beta: (1, 1, 1, C).
    """
    x = F.gelu(hidden)
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    response = size / (size.mean(dim=-1, keepdim=True) + EPS)
    # gamma * (x * response) + beta + x, with the factors of x combined, so that x is read once.
    return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * response).to(x.dtype))


def gelu_response_e4m3(hidden: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`gelu_response` in e4m3. hidden: contiguous; it is not changed.

    Returns:
        e4m3 (B, H, W, C), and each sample's scale, float32 (B,). It is a bound of the sample's values, over 448: no value is
        larger than its channel's norm over all pixels, times the channel's factor.
    """
    x = F.gelu(hidden.float())
    gamma, beta = gamma.float(), beta.float()
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    mean = size.mean(dim=-1, keepdim=True) + EPS
    # Sums of two maxima, of which neither needs the mean.
    bound = (size + beta.abs()).amax(dim=3) + (gamma.abs() * size.square()).amax(dim=3) / mean[..., 0]
    of_samples = bound.flatten().clamp(min=SMALLEST) / LARGEST
    value = torch.addcmul(beta, x, 1 + gamma * (size / mean))
    return in_e4m3(value / of_samples[:, None, None, None]), of_samples


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
    """One softmax over the image's own keys and those of the condition, (B, T, C).

    query, own_key, own_value: (B, T, C), with any stride between rows. Without own ones, attends to the condition alone.
    key, value: (B, heads, tokens, C / heads), with equal strides.
    dropout: of the attention weights.
    bias: float32 (B, tokens), added to the logits of the condition's keys, finite; None: zeros.
    hidden: int32 (B, 2), the first of the condition's keys that the sample does not attend to, and their number; None: it
        attends to all. At least one key of a sample must not be hidden.
    """
    _, heads, context, _ = key.shape

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    if own_key is not None:
        key, value = torch.cat([split(own_key), key], dim=2), torch.cat([split(own_value), value], dim=2)
    mask = None
    if bias is not None or hidden is not None:
        mask = query.new_zeros(len(query), context) if bias is None else bias.to(query.dtype)
        if hidden is not None:
            place, (first, number) = torch.arange(context, device=query.device), hidden.split(1, dim=1)
            mask = mask.masked_fill((place >= first) & (place < first + number), -math.inf)
        mask = F.pad(mask, (key.shape[2] - context, 0))[:, None, None]
    attended = F.scaled_dot_product_attention(split(query), key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def timestep_maps(mappers: Sequence[nn.Module], times: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of all mappers' outputs for their conditions' embeddings: float32 (B, N).

    Args:
        mappers: one Linear per condition, E -> N channels.
        times: the embeddings, float32 (conditions, B, E).
        dtype: the weights' dtype.
    """
    # In float32, because a sum in bfloat16 made the error of the whole prediction 1.5 times as large.
    return sum(mapper(embedding.to(dtype)).float() for mapper, embedding in zip(mappers, times, strict=True))


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix from its numbers and scales (`networks.eight_bits`): the product in float32, rounded to `dtype`, (N, K).

    Args:
        weight: int8 or e4m3 (N, K), contiguous.
        scale: bfloat16 or float32 (N, K / group), contiguous: one for each group of neighbours in a row.
        dtype: of the result.
    """
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    return (groups * scale.float().unsqueeze(2)).flatten(1).to(dtype)


def mixing_block(x: Tensor, gammas: Tensor, depthwise: nn.Module, channelwise: nn.Module) -> Tensor:
    """Stage A's block: a depthwise convolution and a channel MLP, both residual, (B, C, H, W) -> (B, C, H, W).

    Args:
        x: in any memory format.
        gammas: (6,): scale, shift and gate of the convolution, then of the MLP.
        depthwise: padding, then an nn.Conv2d, for (B, C, H, W).
        channelwise: nn.Linear, GELU, nn.Linear, for (B, H, W, C).
    """
    scale1, shift1, gate1, scale2, shift2, gate2 = gammas.unbind()
    spatial = (layer_norm(x.permute(0, 2, 3, 1)) * (1 + scale1) + shift1).permute(0, 3, 1, 2)
    x = x + depthwise(spatial) * gate1
    channel = layer_norm(x.permute(0, 2, 3, 1)) * (1 + scale2) + shift2
    return x + (channelwise(channel) * gate2).permute(0, 3, 1, 2)
