"""The blocks' functions in plain torch: any device, any dtype, differentiable. Also what `triton` is tested against.

Activations are (B, H, W, C), contiguous. Branches are computed in the weights' dtype, the residual stream is float32. Whatever
enters or leaves a branch without a normalisation in between is computed in float32 where the weights are float16, which ends at
65504: a stream of 1e5 stays exact.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.kernels.layers import has_float16_weights, in_float32, is_ordinary
from cascade.kernels.stream import Stream

EPS = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """Over the channels of (B, H, W, C), without learned scale or shift, in the dtype of `x`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def norm(stream: Stream, dtype: torch.dtype, next_linear: nn.Module | None = None) -> tuple[Stream, Tensor]:
    """The settled stream, and its LayerNorm, (B, H, W, C).

    Args:
        dtype: of the normalised result.
        next_linear: the layer that `add_linear` adds next to the stream that is returned. Its bias may already be in there.
    """
    x = stream.settle()
    return Stream(x), layer_norm(x).to(dtype)


def linear(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`layer` of x (B, H, W, K), with `x` in `dtype`. A float32 `x` stays float32 where `dtype` is float16."""
    if dtype == torch.float16 and x.dtype == torch.float32:
        return in_float32(layer, x)
    return layer(x.to(dtype))


def add_linear(stream: Stream, hidden: Tensor, layer: nn.Module, *, after_norm: bool = False) -> Stream:
    """A settled stream plus `layer` of hidden (B, H, W, K). The given stream must not be used afterwards.

    Args:
        hidden: in the weights' dtype, or float32 beside float16 weights.
        after_norm: `norm` made the stream, and was given `layer` as `next_linear`.
    """
    if has_float16_weights(layer) and (hidden.dtype == torch.float32 or is_ordinary(layer)):
        if hidden.dtype == torch.float16 and hidden.is_cuda and not torch.is_grad_enabled():
            return accumulate(stream, hidden, layer)
        return Stream(stream.x + in_float32(layer, hidden.float()))
    return Stream(stream.x + layer(hidden))


def accumulate(stream: Stream, hidden: Tensor, layer: nn.Linear, *, bias_added: bool = False) -> Stream:
    """`add_linear` inside of the matrix product, in place, for an ordinary layer on a CUDA GPU in 16 bits, without gradients."""
    # Costs nothing: a (1152, 2048, 2048) product takes 17 us with or without (H100).
    rows = stream.x.view(-1, stream.x.shape[-1])
    torch.addmm(rows, hidden.flatten(0, 2), layer.weight.t(), out_dtype=torch.float32, out=rows)
    return Stream(stream.x, bias=None if bias_added else layer.bias)


def depthwise_norm(
    stream: Stream, convolution: nn.Module, dtype: torch.dtype, skip: Tensor | None = None
) -> tuple[Stream, Tensor]:
    """The settled stream, and the LayerNorm of its depthwise convolution.

    Args:
        dtype: of the weights, and of the normalised result. With a skip connection and float16, that is float32.
        skip: float32 (B, H, W, C), appended to the channels after the norm.
    """
    x = stream.settle()
    if dtype == torch.float16:
        normed = layer_norm(in_float32(convolution, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return Stream(x), normed.to(dtype) if skip is None else torch.cat([normed, skip], dim=-1)
    normed = layer_norm(convolution(x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    if skip is not None:
        normed = torch.cat([normed, skip.to(normed.dtype)], dim=-1)
    return Stream(x), normed


def gelu_response(hidden: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """GELU, then ConvNeXt V2's global response normalisation (Woo et al., arXiv 2301.00808), over H and W jointly.

    hidden: (B, H, W, C); may be overwritten.
    gamma, beta: (1, 1, 1, C).
    """
    x = F.gelu(hidden)
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)
    response = size / (size.mean(dim=-1, keepdim=True) + EPS)
    # gamma * (x * response) + beta + x, with the per-channel factors joined so that x is read once.
    return torch.addcmul(beta.to(x.dtype), x, (1 + gamma * response).to(x.dtype))


def attention(
    query: Tensor,
    own_key: Tensor | None,
    own_value: Tensor | None,
    key: Tensor,
    value: Tensor,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """One softmax over the image's own keys and those of the condition, (B, T, C).

    query, own_key, own_value: (B, T, C), with any stride between rows. Without own ones, attends to the condition alone.
    key, value: (B, heads, tokens, C / heads), with equal strides.
    dropout: of the attention weights.
    bias: float32 (B, tokens), added to the logits of the condition's keys, finite or -inf; None: zeros. At least one key of a
        sample must have a finite one.
    """
    heads = key.shape[1]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    if own_key is not None:
        key, value = torch.cat([split(own_key), key], dim=2), torch.cat([split(own_value), value], dim=2)
    mask = None
    if bias is not None:
        mask = F.pad(bias, (key.shape[2] - bias.shape[1], 0))[:, None, None].to(query.dtype)
    attended = F.scaled_dot_product_attention(split(query), key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def timestep_maps(mappers: Sequence[nn.Module], times: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the mappers, each of its condition's embedding: float32 (B, N).

    Args:
        mappers: one Linear a condition, E -> N channels.
        times: the embeddings, float32 (conditions, B, E).
        dtype: of the weights.
    """
    # In float32: this sum in bfloat16 made the error of the whole prediction half as large again.
    return sum(mapper(embedding.to(dtype)).float() for mapper, embedding in zip(mappers, times, strict=True))


def mixing_block(x: Tensor, gammas: Tensor, depthwise: nn.Module, channelwise: nn.Module) -> Tensor:
    """Stage A's block: a depthwise convolution and a channel MLP, both residual, (B, C, H, W) -> (B, C, H, W).

    Args:
        x: channels last in memory, or not.
        gammas: (6,): scale, shift and gate of the convolution, then of the MLP.
        depthwise: of (B, C, H, W): padding, then an nn.Conv2d.
        channelwise: of (B, H, W, C): nn.Linear, GELU, nn.Linear.
    """
    scale1, shift1, gate1, scale2, shift2, gate2 = gammas.unbind()
    spatial = (layer_norm(x.permute(0, 2, 3, 1)) * (1 + scale1) + shift1).permute(0, 3, 1, 2)
    x = x + depthwise(spatial) * gate1
    channel = layer_norm(x.permute(0, 2, 3, 1)) * (1 + scale2) + shift2
    return x + (channelwise(channel) * gate2).permute(0, 3, 1, 2)
