"""What a UNet block does beside its matrix products: norms, depthwise convolutions, responses, attention.

Every function is written twice: plainly in torch, differentiable, for any device; and as a Triton kernel (`kernels`), which
inference on a GPU in 16 bits takes instead. Activations are (B, H, W, C), contiguous.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks.joined import Joined

try:
    from cascade.networks import kernels
except ImportError:  # no Triton: no NVIDIA or AMD GPU, or an operating system that it does not support
    kernels = None

logger = logging.getLogger(__name__)

EPS = 1e-6
# Of what is inside of Stage A's MLPs, bytes at a time: of a whole picture of 1024x1024 it would be 384 MiB. They stay in the
# cache of a large GPU.
HIDDEN = 32 * 2**20
_plain = False


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Without kernels, to compare with."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def fused(weight: Tensor) -> bool:
    """Whether a network with this weight is run by the kernels here and now."""
    if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16) or torch.is_grad_enabled() or _plain:
        return False
    if kernels is None:
        _warn_of_missing_triton()
        return False
    return True


@functools.cache
def _warn_of_missing_triton() -> None:
    logger.warning("Triton is not installed: the networks run without their kernels, more slowly.")


class Stream(NamedTuple):
    """The residual stream, with what has yet to be done to it: (x + bias) * (1 + scale) + shift.

    What is left to be done is done by the next block, which reads the stream anyway.

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
        """float32 (B, H, W, C), with nothing left to be done."""
        x = self.x if self.bias is None else self.x + self.bias
        if self.scale is None:
            return x
        return torch.addcmul(self.shift[:, None, None], x, 1 + self.scale[:, None, None])

    def modulate(self, scale: Tensor, shift: Tensor) -> "Stream":
        if self.scale is None:
            return self._replace(scale=scale, shift=shift)
        return Stream(self.settle(), scale=scale, shift=shift)


def layer_norm(x: Tensor) -> Tensor:
    """Over the channels of (B, H, W, C), without learned scale or shift, in the dtype of `x`."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def norm(stream: Stream, weight: Tensor, ahead: nn.Linear | None = None) -> tuple[Stream, Tensor]:
    """The settled stream, and its LayerNorm in the dtype of the weight that it goes to.

    ahead: the layer that `add_linear` will add next to this stream.
    """
    if fused(weight):
        bias = ahead.bias if ahead is not None and _accumulates(ahead) else None
        x, normed = kernels.norm(*stream, bias, weight.dtype)
        return Stream(x), normed
    x = stream.settle()
    return Stream(x), layer_norm(x).to(weight.dtype)


def add_linear(stream: Stream, hidden: Tensor, linear: nn.Linear, was_ahead: bool = False) -> Stream:
    """A settled stream plus `linear` of (B, H, W, K). The stream that was given is not to be used any more.

    was_ahead: whether `norm` was told of it.
    """
    if not _accumulates(linear):
        return Stream(stream.x + linear(hidden))
    # cuBLAS adds to the float32 stream in place, for nothing: 17 us for a (1152, 2048, 2048) product with or without.
    rows = stream.x.flatten(0, 2)
    torch.addmm(rows, hidden.flatten(0, 2), linear.weight.t(), out_dtype=torch.float32, out=rows)
    return Stream(stream.x, bias=None if was_ahead else linear.bias)


def _accumulates(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and fused(linear.weight)


def depthwise_norm(stream: Stream, convolution: nn.Conv2d, skip: Tensor | None = None) -> tuple[Stream, Tensor]:
    """The settled stream, and the LayerNorm of its depthwise convolution, in the weights' dtype.

    skip: float32 (B, H, W, C), appended to the channels after the norm.
    """
    weight = convolution.weight
    if fused(weight) and convolution.kernel_size == (3, 3):
        x, normed = kernels.depthwise_norm(*stream, weight, convolution.bias, skip)
        return Stream(x), normed
    x = stream.settle()
    normed = layer_norm(convolution(x.to(weight.dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    if skip is not None:
        normed = torch.cat([normed, skip.to(normed.dtype)], dim=-1)
    return Stream(x), normed


def gelu_response(hidden: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """GELU, then ConvNeXt V2's global response normalisation (Woo et al., arXiv 2301.00808), over H and W jointly.

    hidden: (B, H, W, C); what it held may be overwritten.
    gamma, beta: (1, 1, 1, C).
    """
    if fused(gamma):
        return kernels.gelu_response(hidden, gamma, beta)
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
) -> Tensor:
    """One softmax over the image's own keys and those of the condition, (B, T, C).

    query, own_key, own_value: (B, T, C), rows at any distance; without own ones, to the condition alone.
    key, value: (B, heads, tokens, C / heads).
    dropout: of the attention weights.
    """
    if fused(query) and key.shape[-1] % 8 == 0:  # loads of 16 bytes
        return kernels.attention(query, own_key, own_value, key, value)
    heads = key.shape[1]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    if own_key is not None:
        key, value = torch.cat([split(own_key), key], dim=2), torch.cat([split(own_value), value], dim=2)
    return F.scaled_dot_product_attention(split(query), key, value, dropout_p=dropout).transpose(1, 2).flatten(2)


def joined_maps(joined: Joined, times: Tensor, blocks: int) -> Tensor:
    """`TimestepBlock.map` of several blocks at once, on a GPU only: (blocks, B, 2 C), float32.

    joined: the blocks' mappers, block by block.
    times: the embeddings, float32 (conditions, B, E).
    """
    weight = joined.weight.view(blocks, times.shape[0], -1, times.shape[2])
    return kernels.joined_maps(weight, joined.bias.view(*weight.shape[:3]), times)


def mixing_block(x: Tensor, gammas: Tensor, depthwise: nn.Conv2d, first: nn.Linear, last: nn.Linear) -> Tensor:
    """What `stage_a.MixingBlock.forward` does, on a GPU only; (B, C, H, W), channels last."""
    x = x.permute(0, 2, 3, 1).contiguous()
    mixed, normed = kernels.mix(x, gammas, depthwise.weight, depthwise.bias, last.bias)
    at_once = HIDDEN // (first.out_features * x.element_size())
    for rows, of_rows in zip(mixed.flatten(0, 2).split(at_once), normed.flatten(0, 2).split(at_once), strict=True):
        # cuBLAS's GELU is the one with tanh: within 5e-4 of the exact one, which is less than bfloat16's rounding.
        hidden = torch._addmm_activation(first.bias, of_rows, first.weight.t(), use_gelu=True)
        torch.addmm(rows, hidden, last.weight.t(), alpha=_gate(gammas), out=rows)
    return mixed.permute(0, 3, 1, 2)


def _gate(gammas: Tensor) -> float:
    """The last of the six, on the host: read once, as reading waits for the GPU."""
    key = (gammas.data_ptr(), gammas._version)
    if getattr(gammas, "_gate", (None,))[0] != key:
        gammas._gate = (key, gammas[5].item())
    return gammas._gate[1]
