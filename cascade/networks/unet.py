"""The denoising UNet of Stages B and C: predicts epsilon from noisy latents, a timestep ratio and conditions.

One class serves both stages; the configuration makes the difference. Config fields and state-dict keys are those of the
published diffusers checkpoints (`StableCascadeUNet`). The arithmetic follows Stability-AI/StableCascade
`modules/stage_b.py`, `stage_c.py` and `common.py`, which run under autocast: timestep embeddings, resized maps and the
residual stream between the blocks are float32 whatever the weights' dtype. Inside of a branch, activations are in the
weights' dtype. With a bfloat16 stream, which is rounded after each of its hundreds of additions, the error of predictions was
1.7 to 4.7 times as large (Stages B and C at full depth and reduced width, random weights, on a CPU).

`StableCascadeUNet.condition` does the work that does not depend on the step. Its result, `Conditions`, serves all steps.
Activations are (batch, height, width, channels), so that LayerNorm and Linear read contiguous memory. The blocks' operations,
except matrix products, are in `cascade.kernels`, in plain torch and as GPU kernels.

Layers with the same input are stacked into one layer: q, k and v of an attention block, and the mappers of one timestep
condition in all blocks. `layout` splits them into the published tensors in state dicts, and stacks those on loading.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.kernels import UsesKernels
from cascade.kernels.layers import columns, is_hooked, put_channels_side_by_side
from cascade.kernels.plain import EPS, layer_norm
from cascade.kernels.stream import Product, Stream
from cascade.networks import layout
from cascade.networks.base import Network, register_to_config
from cascade.networks.fp8 import multiplies

TIMESTEP_CONDITIONS = ("sca", "crp")


class ImageTokens(NamedTuple):
    """Keys and values of one IP-Adapter image for one attention block.

    key, value: (B, heads, tokens, channels per head).
    """

    key: Tensor
    value: Tensor


class Conditions(NamedTuple):
    """The conditions' part of every step, which is computed once.

    keys, values: one tensor per attention block (order: down then up), (B, heads, tokens, channels per head). With
        `StableCascadeUNet.late_conditions`, each key is the condition's tokens (B, tokens, conditioning_dim), and each value
        None.
    feature_map: Stage B's semantic and pixel maps, summed, float32 (B, h / patch, w / patch, channels); None in
        Stage C.
    bias: float32 (B, tokens), added to the logits of the keys in every attention block; None: zeros.
    hidden: int32 (B, 2), the first of the tokens that the sample does not have, and their number; None: it has all.
    images: of an IP-Adapter, by the number of the attention block: one `ImageTokens` per image. None: there is no image.
    masks: for each of these images, its weight at each latent: float32 (1, 1, h, w); None: 1 everywhere.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor | None, ...]
    feature_map: Tensor | None
    bias: Tensor | None = None
    hidden: Tensor | None = None
    images: Mapping[int, tuple[ImageTokens, ...]] | None = None
    masks: tuple[Tensor | None, ...] = ()


def timestep_embedding(ratio: Tensor, dim: int, max_positions: int = 10000) -> Tensor:
    """Sines and cosines of `ratio` (B,) in 0..1, in float32: (B, dim).

    In bfloat16, numbers near 9500 = 0.95 * 10000 are 64 apart, so most frequencies would be noise.
    """
    half = dim // 2
    frequencies = torch.arange(half, device=ratio.device, dtype=torch.float32)
    frequencies = torch.exp(frequencies * (-math.log(max_positions) / (half - 1)))
    angles = (ratio.float() * max_positions)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, h, w) -> (B, C, *size), bilinear with aligned corners, in float32. Returns the dtype of `x`."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), size=tuple(size), mode="bilinear", align_corners=True).to(x.dtype)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), without learned scale or shift. Returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(layer_norm(channels_last(x.float())))


class Pointwise(nn.Conv2d):
    """A 1x1 convolution of (B, H, W, C)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class GeluResponse(UsesKernels, nn.Module):
    """GELU and response normalisation of (B, H, W, C), see `kernels.plain.gelu_response`."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.kernels.gelu_response(hidden, self.gamma, self.beta)


class ResBlock(UsesKernels, nn.Module):
    """Depthwise convolution, norm, then a channel MLP, which also reads the skip connection. Residual."""

    def __init__(self, channels: int, skip_channels: int, kernel_size: int, dropout: float):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip_channels, channels * 4),
            nn.Identity(),  # so that the response norm has its published index, 2
            GeluResponse(channels * 4),
            nn.Dropout(dropout),
            nn.Linear(channels * 4, channels),
        )

    def prepare(self) -> None:
        if self.implementation == "triton":
            put_channels_side_by_side(self.depthwise)

    def forward(self, stream: Stream, skip: Tensor | None = None) -> Stream:
        """stream: (B, H, W, C). skip: float32 (B, H, W, skip_channels)."""
        if skip is None and self._multiplies_in_e4m3():
            return self._in_e4m3(stream)
        first, _, response, dropout, last = self.channelwise
        dtype = response.gamma.dtype  # the weights' dtype. A replaced linear layer may store another one.
        stream, normed = self.kernels.depthwise_norm(stream, self.depthwise, dtype, skip)
        hidden = dropout(response(self.kernels.linear(first, normed, dtype)))
        return self.kernels.add_linear(stream, hidden, last)

    def _multiplies_in_e4m3(self) -> bool:
        """Whether both layers of the MLP can do that, and nothing between them must be called."""
        first, _, response, dropout, last = self.channelwise
        ordinary = type(response) is GeluResponse and type(dropout) is nn.Dropout and not dropout.training
        return ordinary and multiplies(first, last) and not is_hooked(response) and not is_hooked(dropout)

    def _in_e4m3(self, stream: Stream) -> Stream:
        """`forward` without a skip connection, with products in e4m3: see `networks.fp8`."""
        first, _, response, _, last = self.channelwise
        stream, normed = self.kernels.depthwise_norm(stream, self.depthwise, first.dtype, e4m3=True)
        hidden, scale = self.kernels.gelu_response_e4m3(first.multiply(normed), response.gamma, response.beta)
        return stream._replace(bias=last.bias, product=Product(last.product(hidden), scale))


class TimestepBlock(nn.Module):
    """Scales and shifts channels by the timestep and the extra conditions (`sca`, `crp`). See `TimestepMappers`."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, stream: Stream, scale: Tensor, shift: Tensor) -> Stream:
        """scale, shift: float32 (B, C)."""
        return stream.modulate(scale, shift)


class TimestepMappers(UsesKernels, nn.Module):
    """Embeddings of the timestep and the extra conditions -> the scales and shifts of all TimestepBlocks.

    One Linear per condition, with the channels of all blocks side by side: `timestep`, and `sca` and `crp` if the network has
    these conditions.

    Args:
        embedding_dim: E, length of an embedding.
        conditions: the extra conditions, a subset of "sca" and "crp".
        widths: channels C of each block.
    """

    def __init__(self, embedding_dim: int, conditions: Sequence[str], widths: Sequence[int]):
        super().__init__()
        self.names = ("timestep", *conditions)
        self.widths = tuple(widths)
        for name in self.names:
            setattr(self, name, nn.Linear(embedding_dim, 2 * sum(widths)))

    def forward(self, times: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Float32 embeddings (conditions, B, E) -> scale and shift of each block, float32 (B, C) each.

        dtype: the weights' dtype.
        """
        mapped = self.kernels.timestep_maps([getattr(self, name) for name in self.names], times, dtype)
        return [one.chunk(2, dim=1) for one in mapped.split([2 * width for width in self.widths], dim=1)]


class Attention(UsesKernels, nn.Module):
    """Multi-head attention. Dropout acts on the attention weights, as in training.

    `to_qkv` is to_q, to_k and to_v of the published files, one below the other.
    """

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__()
        self.channels = channels
        self.heads = heads
        self.dropout = dropout
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def key_value(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, tokens, C) -> (B, heads, tokens, C / heads), twice."""
        pair = columns(self.to_qkv, tokens, self.channels, 3 * self.channels).chunk(2, dim=-1)
        return tuple(x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in pair)

    def forward(
        self,
        tokens: Tensor,
        key: Tensor,
        value: Tensor,
        own: bool,
        bias: Tensor | None = None,
        hidden: Tensor | None = None,
        images: Sequence[ImageTokens] = (),
        shares: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """Attention of tokens (B, T, C), before `to_out`: (B, T, C).

        tokens: in the weights' dtype, or in e4m3 for an `Fp8Linear`.
        key, value: of the condition, as `key_value` returns them.
        own: whether the tokens attend to each other too.
        bias: float32 (B, condition tokens), added to the logits of the condition's keys.
        hidden: int32 (B, 2), see `Conditions`.
        images: of an IP-Adapter. For each image, attention to its tokens alone is computed and added.
        shares: for each image, the factor on this result, (1, T, 1); None: 1.
        """
        if own:
            query, own_key, own_value = self.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, own_key, own_value = columns(self.to_qkv, tokens, 0, self.channels), None, None
        dropout = self.dropout if self.training else 0.0
        attended = self.kernels.attention(query, own_key, own_value, key, value, dropout, bias, hidden)
        for image, share in zip(images, shares, strict=True):
            added = self.kernels.attention(query, None, None, image.key, image.value)
            attended = attended + added if share is None else torch.addcmul(attended, added, share.to(added.dtype))
        return attended


class ConditionKeyValue(nn.Module):
    """The part of an AttnBlock that runs once per picture. A module without weights of its own, so that it can have hooks."""

    def forward(self, tokens: Tensor, kv_mapper: nn.Module, attention: Attention) -> tuple[Tensor, Tensor]:
        """Condition tokens (B, T, condition_dim) -> keys and values, each (B, heads, T, channels / heads)."""
        return attention.key_value(kv_mapper(tokens))


class AttnBlock(UsesKernels, nn.Module):
    """One softmax over the image's own tokens and the condition's.

    `condition(tokens, kv_mapper, attention)` gives the latter's keys and values, see `ConditionKeyValue`.
    """

    def __init__(self, channels: int, condition_dim: int, heads: int, self_attn: bool, dropout: float):
        super().__init__()
        self.self_attn = self_attn
        self.attention = Attention(channels, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(condition_dim, channels))
        self.condition = ConditionKeyValue()

    def forward(
        self,
        stream: Stream,
        key: Tensor,
        value: Tensor | None,
        bias: Tensor | None = None,
        hidden: Tensor | None = None,
        images: Sequence[ImageTokens] = (),
        masks: Sequence[Tensor | None] = (),
    ) -> Stream:
        """stream: (B, H, W, C). key, value, and the others: one block's part of `Conditions`."""
        if value is None:
            key, value = self.condition(key, self.kv_mapper, self.attention)
        (out,) = self.attention.to_out
        e4m3 = self.self_attn and multiplies(self.attention.to_qkv) and not is_hooked(self.attention)
        stream, normed = self.kernels.norm(stream, key.dtype, next_linear=out, e4m3=e4m3)
        shares = [None if one is None else resize(one, normed.shape[1:3]).view(1, -1, 1) for one in masks]
        attended = self.attention(normed.flatten(1, 2), key, value, self.self_attn, bias, hidden, images, shares)
        # The dtype that `norm` was told: a replaced to_qkv may return another.
        attended = attended.to(key.dtype).view(normed.shape)
        return self.kernels.add_linear(stream, attended, out, after_norm=True)


class Rescale(nn.Module):
    """1x1 convolution between levels. If enabled, resizes by `factor`: before it to enlarge, after it to shrink."""

    def __init__(self, in_channels: int, out_channels: int, factor: float, enabled: bool):
        super().__init__()
        self.factor = factor if enabled else 1.0
        mapping = nn.Conv2d(in_channels, out_channels, kernel_size=1)
        # The convolution's published name is blocks.1 in up blocks and blocks.0 in down blocks.
        self.blocks = nn.ModuleList([nn.Identity(), mapping] if factor > 1 else [mapping])

    def forward(self, x: Tensor) -> Tensor:
        if self.factor > 1:
            x = resize(x, [int(side * self.factor) for side in x.shape[-2:]])
        x = self.blocks[-1](x)
        if self.factor < 1:
            x = resize(x, [int(side * self.factor) for side in x.shape[-2:]])
        return x


def map_mapper(in_channels: int, channels: int) -> nn.Sequential:
    """A pointwise MLP that maps a conditioning map to the first level's channels."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels * 4, kernel_size=1),
        nn.GELU(),
        nn.Conv2d(channels * 4, channels, kernel_size=1),
        LayerNorm2d(),
    )


class StableCascadeUNet(UsesKernels, Network):
    """Stage B or Stage C.

    Parameters (defaults: the published Stage C 3.6B; tuples have one value per level, finest first):
        in_channels, out_channels (`int`, 16): channels of the latents (Stage B: 4).
        timestep_ratio_embedding_dim (`int`, 64): length of a timestep's embedding.
        patch_size (`int`, 1): factor of the pixel unshuffling of the input (Stage B: 2).
        conditioning_dim (`int`, 2048): length of a condition token.
        block_out_channels (`tuple[int]`): width of each level.
        num_attention_heads (`tuple[int]`): attention heads of each level; ignored without attention.
        down_num_layers_per_block, up_num_layers_per_block (`tuple[int]`): layers of each level; `up` is coarsest first.
        down_blocks_repeat_mappers, up_blocks_repeat_mappers (`tuple[int]`): how many times each level is run, with a 1x1
            convolution in between; `up` is coarsest first.
        block_types_per_layer (`tuple[tuple[str]]`): the blocks of a layer: "SDCascadeResBlock", "SDCascadeTimestepBlock"
            or "SDCascadeAttnBlock".
        clip_text_in_channels, clip_image_in_channels (`int | None`): length of text tokens and image embeddings; None
            in Stage B.
        clip_text_pooled_in_channels (`int`, 1280): length of the pooled text embedding.
        clip_seq (`int`, 4): number of condition tokens made from one pooled embedding.
        effnet_in_channels, pixel_mapper_in_channels (`int | None`): channels of Stage B's maps; None in Stage C.
        kernel_size (`int`, 3): size of the depthwise kernels.
        dropout (`float | tuple[float]`): dropout of the channel MLPs and attention weights, in training.
        self_attn (`bool | tuple[bool]`, True): whether image tokens attend to each other.
        timestep_conditioning_type (`tuple[str]`): extra timestep-like conditions, a subset of "sca" and "crp".
        switch_level (`tuple[bool] | None`): None: strided convolutions between levels. Otherwise 1x1 convolutions, with a
            bilinear resize where it is True.

    Raises ValueError for tuples of unequal length and unknown block or condition names.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int = 16,
        timestep_ratio_embedding_dim: int = 64,
        patch_size: int = 1,
        conditioning_dim: int = 2048,
        block_out_channels: tuple[int, ...] = (2048, 2048),
        num_attention_heads: tuple[int, ...] = (32, 32),
        down_num_layers_per_block: tuple[int, ...] = (8, 24),
        up_num_layers_per_block: tuple[int, ...] = (24, 8),
        down_blocks_repeat_mappers: tuple[int, ...] = (1, 1),
        up_blocks_repeat_mappers: tuple[int, ...] = (1, 1),
        block_types_per_layer: tuple[tuple[str, ...], ...] = (
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_in_channels: int | None = None,
        clip_text_pooled_in_channels: int = 1280,
        clip_image_in_channels: int | None = None,
        clip_seq: int = 4,
        effnet_in_channels: int | None = None,
        pixel_mapper_in_channels: int | None = None,
        kernel_size: int = 3,
        dropout: float | tuple[float, ...] = (0.1, 0.1),
        self_attn: bool | tuple[bool, ...] = True,
        timestep_conditioning_type: tuple[str, ...] = ("sca", "crp"),
        switch_level: tuple[bool, ...] | None = None,
    ):
        super().__init__()
        widths = tuple(block_out_channels)
        levels = len(widths)
        dropout = (dropout,) * levels if isinstance(dropout, float | int) else dropout
        self_attn = (self_attn,) * levels if isinstance(self_attn, bool) else self_attn
        per_level = {
            "num_attention_heads": num_attention_heads,
            "down_num_layers_per_block": down_num_layers_per_block,
            "up_num_layers_per_block": up_num_layers_per_block,
            "down_blocks_repeat_mappers": down_blocks_repeat_mappers,
            "up_blocks_repeat_mappers": up_blocks_repeat_mappers,
            "block_types_per_layer": block_types_per_layer,
            "dropout": dropout,
            "self_attn": self_attn,
        }
        for name, value in per_level.items():
            if len(value) != levels:
                raise ValueError(f"{name} has {len(value)} values; block_out_channels has {levels}, one per level.")
        if patch_size < 1:
            raise ValueError(f"patch_size is {patch_size}; it must be at least 1.")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd.")
        for width, heads, kinds in zip(widths, num_attention_heads, block_types_per_layer, strict=True):
            if "SDCascadeAttnBlock" in kinds and (heads < 1 or width % heads):
                raise ValueError(f"num_attention_heads, {heads}, does not divide block_out_channels, {width}.")
        for name in timestep_conditioning_type:
            if name not in TIMESTEP_CONDITIONS:
                raise ValueError(f"timestep_conditioning_type holds {name!r}; allowed: {TIMESTEP_CONDITIONS}.")
        if pixel_mapper_in_channels is not None and effnet_in_channels is None:
            raise ValueError("pixel_mapper_in_channels is set but effnet_in_channels is not; the maps are summed.")

        self.effnet_mapper = None if effnet_in_channels is None else map_mapper(effnet_in_channels, widths[0])
        self.pixels_mapper = (
            None if pixel_mapper_in_channels is None else map_mapper(pixel_mapper_in_channels, widths[0])
        )
        self.clip_txt_pooled_mapper = nn.Linear(clip_text_pooled_in_channels, conditioning_dim * clip_seq)
        self.clip_txt_mapper = (
            None if clip_text_in_channels is None else nn.Linear(clip_text_in_channels, conditioning_dim)
        )
        self.clip_img_mapper = (
            None if clip_image_in_channels is None else nn.Linear(clip_image_in_channels, conditioning_dim * clip_seq)
        )
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size),
            Pointwise(in_channels * patch_size**2, widths[0]),
            LayerNorm2d(),
        )

        def make_block(kind: str, level: int, skip_channels: int) -> nn.Module:
            width = widths[level]
            if kind == "SDCascadeResBlock":
                return ResBlock(width, skip_channels, kernel_size, dropout[level])
            if kind == "SDCascadeTimestepBlock":
                return TimestepBlock(width)
            if kind == "SDCascadeAttnBlock":
                heads = num_attention_heads[level]
                return AttnBlock(width, conditioning_dim, heads, self_attn[level], dropout[level])
            raise ValueError(
                f"block_types_per_layer holds {kind!r}; allowed: SDCascadeResBlock, SDCascadeTimestepBlock, "
                "SDCascadeAttnBlock."
            )

        def make_level(level: int, layers: int, skip: bool) -> nn.ModuleList:
            kinds = list(block_types_per_layer[level]) * layers
            return nn.ModuleList(
                make_block(kind, level, widths[level] if skip and i == 0 else 0) for i, kind in enumerate(kinds)
            )

        def make_repeats(level: int, times: int) -> nn.ModuleList:
            return nn.ModuleList(Pointwise(widths[level], widths[level]) for _ in range(times - 1))

        def make_downscaler(level: int) -> nn.Module:
            if level == 0:
                return nn.Identity()
            fine, coarse = widths[level - 1], widths[level]
            if switch_level is None:
                return nn.Sequential(LayerNorm2d(), nn.Conv2d(fine, coarse, kernel_size=2, stride=2))
            return nn.Sequential(LayerNorm2d(), Rescale(fine, coarse, 0.5, switch_level[level - 1]))

        def make_upscaler(level: int) -> nn.Module:
            if level == 0:
                return nn.Identity()
            fine, coarse = widths[level - 1], widths[level]
            if switch_level is None:
                return nn.Sequential(LayerNorm2d(), nn.ConvTranspose2d(coarse, fine, kernel_size=2, stride=2))
            return nn.Sequential(LayerNorm2d(), Rescale(coarse, fine, 2.0, switch_level[level - 1]))

        down = range(levels)
        self.down_blocks = nn.ModuleList(make_level(i, down_num_layers_per_block[i], skip=False) for i in down)
        self.down_downscalers = nn.ModuleList(make_downscaler(i) for i in down)
        self.down_repeat_mappers = nn.ModuleList(make_repeats(i, down_blocks_repeat_mappers[i]) for i in down)
        # `up` tuples and modules are coarsest first.
        up = list(enumerate(reversed(down)))
        self.up_blocks = nn.ModuleList(make_level(i, up_num_layers_per_block[k], skip=k > 0) for k, i in up)
        self.up_upscalers = nn.ModuleList(make_upscaler(i) for _, i in up)
        self.up_repeat_mappers = nn.ModuleList(make_repeats(i, up_blocks_repeat_mappers[k]) for k, i in up)

        self.clf = nn.Sequential(
            LayerNorm2d(),
            Pointwise(widths[0], out_channels * patch_size**2),
            nn.PixelShuffle(patch_size),
        )
        widths = [block.channels for block in self.blocks() if isinstance(block, TimestepBlock)]
        self.timestep_mappers = (
            TimestepMappers(timestep_ratio_embedding_dim, timestep_conditioning_type, widths) if widths else None
        )
        self.gradient_checkpointing = False
        # Whether blocks compute their keys and values in their own forward, at every step. Training that shards weights by block
        # needs that: the weights of other blocks are not there.
        self.late_conditions = False
        layout.publish(self, self._stacked())
        self.init_weights()

    def _stacked(self) -> dict[str, dict[str, int]]:
        """The stacked layers and their published layers, see `layout.publish`."""
        names = {module: name for name, module in self.named_modules()}
        stacked = {
            f"{names[block]}.attention.to_qkv": {
                f"{names[block]}.attention.to_{part}": block.attention.channels for part in "qkv"
            }
            for block in self.blocks()
            if isinstance(block, AttnBlock)
        }
        for condition in () if self.timestep_mappers is None else self.timestep_mappers.names:
            mapper = "mapper" if condition == "timestep" else f"mapper_{condition}"
            stacked[f"timestep_mappers.{condition}"] = {
                f"{names[block]}.{mapper}": 2 * block.channels
                for block in self.blocks()
                if isinstance(block, TimestepBlock)
            }
        return stacked

    def init_weights(self) -> None:
        """The authors' initialisation for training from scratch: the network predicts zero, and blocks are near identity.

        Takes no time in `networks.base.without_values`.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for mapper in (self.clip_txt_pooled_mapper, self.clip_txt_mapper, self.clip_img_mapper):
            if mapper is not None:
                nn.init.normal_(mapper.weight, std=0.02)
        for mapper in (self.effnet_mapper, self.pixels_mapper):
            if mapper is not None:
                nn.init.normal_(mapper[0].weight, std=0.02)
                nn.init.normal_(mapper[2].weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        depth = sum(self.config.down_num_layers_per_block)
        for block in self.blocks():
            if isinstance(block, ResBlock):
                nn.init.xavier_uniform_(block.channelwise[-1].weight, gain=depth**-0.5)
        for name in () if self.timestep_mappers is None else self.timestep_mappers.names:
            nn.init.zeros_(getattr(self.timestep_mappers, name).weight)

    def blocks(self) -> list[nn.Module]:
        """All blocks, down then up. ResBlocks are numbered, and `Conditions` listed, in this order."""
        return [block for level in (*self.down_blocks, *self.up_blocks) for block in level]

    def executed(self) -> list[nn.Module]:
        """All blocks in the order in which a forward runs them. Repeated levels occur repeatedly."""
        down = zip(self.down_blocks, self.down_repeat_mappers, strict=True)
        up = zip(self.up_blocks, self.up_repeat_mappers, strict=True)
        return [block for blocks, repeats in (*down, *up) for _ in range(len(repeats) + 1) for block in blocks]

    def condition(
        self,
        clip_text_pooled: Tensor,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        effnet: Tensor | None = None,
        pixels: Tensor | None = None,
        latent_size: tuple[int, int] | None = None,
        clip_text_bias: Tensor | None = None,
        clip_text_lengths: Tensor | None = None,
    ) -> Conditions:
        """Do the work that does not depend on the step. Differentiable.

        clip_text_pooled: (B, 1, P) or (B, P), projected text embedding.
        clip_text: (B, N, T), the text encoder's last hidden states; in training, N is 77. Stage C needs it, Stage B takes
            none.
        clip_img: (B, N, I) or (B, I), image embeddings; None: no image, which is zeros. Stage C only.
        effnet: (B, E, h, w), semantic latents of any size. Stage B needs it.
        pixels: (B, 3, h, w), a low-resolution image of any size; None: zeros. Stage B only.
        latent_size: (height, width) of the sample. Needed together with `effnet`.
        clip_text_bias: float32 (B, N), finite, added to the logits of the text's keys: ln k makes a token count k times.
            None: zeros.
        clip_text_lengths: int32 (B,), how many tokens of the text each sample has; what follows is padding, which has no
            effect. None: all.
        Raises ValueError if an input that the network needs is missing.
        """
        if self.effnet_mapper is not None and (effnet is None or latent_size is None):
            raise ValueError("This network is conditioned on semantic latents: give effnet and latent_size.")
        tokens = self._condition_tokens(clip_text_pooled, clip_text, clip_img)
        attention = [block for block in self.blocks() if isinstance(block, AttnBlock)]
        if self.late_conditions:
            pairs = [(tokens, None)] * len(attention)
        else:
            pairs = [block.condition(tokens, block.kv_mapper, block.attention) for block in attention]
        feature_map = None
        if self.effnet_mapper is not None:
            size = [side // self.config.patch_size for side in latent_size]
            feature_map = self.effnet_mapper(resize(effnet.float(), size).to(self._weight_dtype))
        if self.pixels_mapper is not None:
            # A constant image gives a constant map, so one pixel is enough.
            if pixels is None:
                pixels = tokens.new_zeros(1, self.config.pixel_mapper_in_channels, 1, 1)
            mapped = self.pixels_mapper(pixels.to(self._weight_dtype))
            if mapped.shape[-2:] != (1, 1):
                mapped = resize(mapped, feature_map.shape[-2:])
            feature_map = feature_map + mapped
        if feature_map is not None:
            feature_map = channels_last(feature_map)
        bias = hidden = None
        if clip_text_bias is not None:  # the text is the first of the tokens
            bias = F.pad(clip_text_bias.float(), (0, tokens.shape[1] - clip_text_bias.shape[1]))
        if clip_text_lengths is not None:
            hidden = torch.stack([clip_text_lengths, clip_text.shape[1] - clip_text_lengths], dim=1)
        return Conditions(tuple(key for key, _ in pairs), tuple(value for _, value in pairs), feature_map, bias, hidden)

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.embedding[1].weight.dtype

    def _condition_tokens(self, pooled: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """Condition tokens in the published order, text, pooled, image: (B, tokens, conditioning_dim)."""
        dim = self.config.conditioning_dim
        batch = pooled.shape[0]
        parts = [self.clip_txt_pooled_mapper(pooled.to(self._weight_dtype)).view(batch, -1, dim)]
        if self.clip_txt_mapper is not None:
            if text is None:
                raise ValueError("This network is conditioned on text tokens: give clip_text.")
            parts.insert(0, self.clip_txt_mapper(text.to(self._weight_dtype)))
        if self.clip_img_mapper is not None:
            if image is None:
                image = pooled.new_zeros(batch, 1, self.config.clip_image_in_channels)
            parts.append(self.clip_img_mapper(image.to(self._weight_dtype)).view(batch, -1, dim))
        return F.layer_norm(torch.cat(parts, dim=1), (dim,), eps=EPS)

    def forward(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        conditions: Conditions | None = None,
        *,
        clip_text_pooled: Tensor | None = None,
        clip_text: Tensor | None = None,
        clip_img: Tensor | None = None,
        effnet: Tensor | None = None,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        controlnet_residuals: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise in `sample`.

        sample: (B, in_channels, H, W), any float dtype; H and W are multiples of patch_size.
        timestep_ratio: (B,) in 0..1, float32.
        conditions: the result of `condition`; None: it is called with the tensors given here by name.
        sca, crp: (B,) in 0..1; None: zeros, as in training.
        controlnet_residuals: {k: (B, C, h, w)}, resized and added before ResBlock k in execution order, down then up.
        Returns epsilon in the shape and dtype of `sample`.
        Raises ValueError if H or W is not a multiple of patch_size, and for missing conditions.
        """
        patch = self.config.patch_size
        if sample.shape[-2] % patch or sample.shape[-1] % patch:
            raise ValueError(f"sample is {sample.shape[-2]}x{sample.shape[-1]}; sides must be multiples of {patch}.")
        if conditions is None:
            if clip_text_pooled is None:
                raise ValueError("Neither conditions nor clip_text_pooled is given; one is needed.")
            size = (sample.shape[-2], sample.shape[-1])
            conditions = self.condition(clip_text_pooled, clip_text, clip_img, effnet, pixels, size)

        extra = {"sca": sca, "crp": crp}
        ratios = [timestep_ratio, *(extra[name] for name in self.config.timestep_conditioning_type)]
        dim = self.config.timestep_ratio_embedding_dim
        times = torch.stack(
            [timestep_embedding(torch.zeros_like(timestep_ratio) if r is None else r, dim) for r in ratios]
        )
        per_block: dict[nn.Module, tuple[Any, ...]] = {}
        if self.timestep_mappers is not None:
            mapped = [block for block in self.blocks() if isinstance(block, TimestepBlock)]
            per_block |= zip(mapped, self.timestep_mappers(times, self._weight_dtype), strict=True)
        attention = [block for block in self.blocks() if isinstance(block, AttnBlock)]
        images = conditions.images or {}
        pairs = zip(conditions.keys, conditions.values, strict=True)
        for number, (block, pair) in enumerate(zip(attention, pairs, strict=True)):
            adapter = (images[number], conditions.masks) if number in images else ()
            per_block[block] = (*pair, conditions.bias, conditions.hidden, *adapter)

        stream = self._embed(sample, conditions.feature_map)
        residuals = controlnet_residuals or {}
        executed = 0  # ResBlocks run so far
        skips: list[Tensor | None] = []
        for blocks, downscaler, repeats in zip(
            self.down_blocks, self.down_downscalers, self.down_repeat_mappers, strict=True
        ):
            stream = self._change_level(downscaler, stream)
            stream, executed = self._run_level(blocks, repeats, stream, None, per_block, residuals, executed)
            stream = Stream(stream.settle())
            skips.append(stream.x)
        skips[-1] = None  # the coarsest level has no skip connection
        for blocks, upscaler, repeats in zip(self.up_blocks, self.up_upscalers, self.up_repeat_mappers, strict=True):
            skip = skips.pop()  # frees it early: at 1024x1024, one of Stage B's takes 20 MiB per sample
            stream, executed = self._run_level(blocks, repeats, stream, skip, per_block, residuals, executed)
            stream = self._change_level(upscaler, stream)
        _, projection, shuffle = self.clf
        _, normed = self.kernels.norm(stream, self._weight_dtype)
        return shuffle(channels_first(projection(normed))).to(sample.dtype)

    def _embed(self, sample: Tensor, feature_map: Tensor | None) -> Stream:
        unshuffle, projection, _ = self.embedding
        x = channels_last(unshuffle(sample).to(self._weight_dtype))
        x = layer_norm(projection(x).float())
        return Stream(x if feature_map is None else x + feature_map)

    def _change_level(self, scaler: nn.Module, stream: Stream) -> Stream:
        if isinstance(scaler, nn.Identity):  # at the finest level
            return stream
        _, mapping = scaler
        _, normed = self.kernels.norm(stream, self._weight_dtype)
        return Stream(channels_last(mapping(channels_first(normed))).float())

    def _run_level(
        self,
        blocks: nn.ModuleList,
        repeats: nn.ModuleList,
        stream: Stream,
        skip: Tensor | None,
        per_block: Mapping[nn.Module, tuple[Any, ...]],
        residuals: Mapping[int, Tensor],
        executed: int,
    ) -> tuple[Stream, int]:
        """Run one level len(repeats) + 1 times. Returns its output and the number of ResBlocks executed so far."""
        for repeat in range(len(repeats) + 1):
            for i, block in enumerate(blocks):
                if isinstance(block, ResBlock):
                    block_skip = skip if i == 0 else None
                    if block_skip is not None and stream.x.shape[1:3] != block_skip.shape[1:3]:
                        # Shrinking rounds odd sides down, so they are one row or column short here.
                        grown = resize(channels_first(stream.settle()), block_skip.shape[1:3])
                        stream = Stream(channels_last(grown))
                    if executed in residuals:
                        residual = resize(residuals[executed].float(), stream.x.shape[1:3])
                        stream = Stream(stream.settle() + channels_last(residual))
                    stream = self._run(block, stream, block_skip)
                    executed += 1
                else:
                    stream = self._run(block, stream, *per_block[block])
            if repeat < len(repeats):
                again = self.kernels.linear(repeats[repeat], stream.settle(), self._weight_dtype)
                stream = Stream(again.float())
        return stream, executed

    def _run(self, block: nn.Module, *args: Any) -> Stream:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
