"""An IP-Adapter of Stage C: turns images into additional keys and values for some of Stage C's attention blocks.

The design is that of IP-Adapter Plus (Ye et al., arXiv 2308.06721): a resampler reads the image encoder's last hidden states
but one, and each adapted block has a second softmax, over the image's tokens alone, whose result is added to the block's own
before the output projection. Tensors have the names of that project's files (`image_proj.*`, `ip_adapter.N.to_k_ip.weight`);
N counts Stage C's attention blocks in execution order, down then up. The differences follow from Stage C:

- A token passes SiLU, as Stage C's own condition tokens do, and then one matrix that gives the key. Before training, this
  matrix is the product of the block's own two (`copy_keys`), without their biases, which do not change a softmax over these
  keys alone.
- The value matrices begin as zeros, so an untrained adapter changes nothing.

Keys and values depend on neither the latents nor the step: one forward serves all steps of a picture.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks.base import Network, register_to_config
from cascade.networks.unet import AttnBlock, Conditions, ImageTokens, StableCascadeUNet

# Each mode uses some of the adapted blocks.
MODES = ("all", "style", "composition")
# Every fourth of the published Stage C's 64 attention blocks.
PUBLISHED_BLOCKS = tuple(range(0, 64, 4))


class ResamplerAttention(nn.Module):
    """Attention of the queries to the image's features and to each other, before the residual."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """features (B, S, W) and queries (B, N, W) -> (B, N, W)."""
        features, queries = self.norm1(features), self.norm2(queries)
        key, value = self.to_kv(torch.cat([features, queries], dim=1)).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.to_q(queries), key, value)
        )
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """A perceiver: learned queries attend to any number of features. Each query becomes one token.

    Args:
        feature_dim: length of a feature.
        width: of the queries inside.
        depth: number of layers, each an attention and a channel MLP of four times the width.
        heads, head_dim: of the attention.
        num_tokens, token_dim: of the tokens.
    """

    def __init__(
        self, feature_dim: int, width: int, depth: int, heads: int, head_dim: int, num_tokens: int, token_dim: int
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, num_tokens, width))
        nn.init.normal_(self.latents, std=width**-0.5)
        self.proj_in = nn.Linear(feature_dim, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    ResamplerAttention(width, heads, head_dim),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, token_dim)
        self.norm_out = nn.LayerNorm(token_dim)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, S, feature_dim) -> (B, num_tokens, token_dim), normalised."""
        features = self.proj_in(features)
        queries = self.latents.expand(len(features), -1, -1)
        for attention, feed_forward in self.layers:
            queries = queries + attention(features, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


class ImageKeyValue(nn.Module):
    """The keys and values of one attention block."""

    def __init__(self, token_dim: int, channels: int):
        super().__init__()
        self.to_k_ip = nn.Linear(token_dim, channels, bias=False)
        self.to_v_ip = nn.Linear(token_dim, channels, bias=False)
        nn.init.zeros_(self.to_v_ip.weight)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapter(Network):
    """A resampler, and for each adapted attention block of Stage C the matrices of its keys and values.

    Parameters (defaults: for the published Stage C and image encoder):
        feature_dim (`int`, 1024): width of the image encoder's hidden states.
        num_tokens (`int`, 16): tokens per image.
        hidden_size (`int`, 1280): width of the resampler.
        num_hidden_layers (`int`, 4), num_attention_heads (`int`, 20), attention_head_dim (`int`, 64): of the resampler.
        conditioning_dim (`int`, 2048): length of a token.
        blocks (`tuple[int]`): the adapted attention blocks of Stage C, by their number in execution order, down then up.
        block_channels (`int | tuple[int]`, 2048): width of these blocks; one for all, or one each.
        style_blocks, composition_blocks (`tuple[int]`, ()): those of `blocks` that the modes "style" and "composition" use;
            empty: not known, and the mode cannot be used.

    Untrained, it changes nothing: all values are zero.
    Raises ValueError if a block is named twice, if the numbers of widths and blocks differ, or if a style or composition
    block is not adapted.
    """

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 1024,
        num_tokens: int = 16,
        hidden_size: int = 1280,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 20,
        attention_head_dim: int = 64,
        conditioning_dim: int = 2048,
        blocks: tuple[int, ...] = PUBLISHED_BLOCKS,
        block_channels: int | tuple[int, ...] = 2048,
        style_blocks: tuple[int, ...] = (),
        composition_blocks: tuple[int, ...] = (),
    ):
        super().__init__()
        if len(set(blocks)) != len(blocks) or not blocks:
            raise ValueError(f"blocks is {tuple(blocks)}; it must name at least one block, and none twice.")
        if not isinstance(block_channels, int) and len(block_channels) != len(blocks):
            raise ValueError(f"block_channels has {len(block_channels)} values; blocks has {len(blocks)}.")
        for name, chosen in (("style_blocks", style_blocks), ("composition_blocks", composition_blocks)):
            if not set(chosen) <= set(blocks):
                raise ValueError(f"{name} is {tuple(chosen)}; each must be one of blocks, {tuple(blocks)}.")
        self.image_proj = Resampler(
            feature_dim,
            hidden_size,
            num_hidden_layers,
            num_attention_heads,
            attention_head_dim,
            num_tokens,
            conditioning_dim,
        )
        self.ip_adapter = nn.ModuleDict(
            {str(block): ImageKeyValue(conditioning_dim, width) for block, width in self.widths.items()}
        )

    @property
    def widths(self) -> dict[int, int]:
        """The width of each adapted block, by its number."""
        channels = self.config.block_channels
        channels = (channels,) * len(self.config.blocks) if isinstance(channels, int) else channels
        return dict(zip(self.config.blocks, channels, strict=True))

    def blocks_of(self, mode: str) -> tuple[int, ...]:
        """The blocks that a mode, one of `MODES`, uses; none if the configuration does not name them."""
        return tuple(self.config.blocks if mode == "all" else self.config[f"{mode}_blocks"])

    def forward(self, features: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """The image encoder's last hidden states but one, (B, S, feature_dim) -> keys and values by block.

        Each is (B, num_tokens, width of the block), in the weights' dtype.
        """
        tokens = F.silu(self.image_proj(features.to(self.image_proj.latents.dtype)))
        return {int(block): pair(tokens) for block, pair in self.ip_adapter.items()}

    @torch.no_grad()
    def copy_keys(self, prior: StableCascadeUNet) -> None:
        """Start with the keys that Stage C's own blocks make from condition tokens, except for a constant.

        prior: a Stage C with ordinary layers that fits, see `misfit`.
        """
        blocks = attention_blocks(prior)
        for number, pair in self.ip_adapter.items():
            block = blocks[int(number)]
            _, mapper = block.kv_mapper
            channels = block.attention.channels
            pair.to_k_ip.weight.copy_(block.attention.to_qkv.weight[channels : 2 * channels] @ mapper.weight)

    def misfit(self, prior: StableCascadeUNet, feature_dim: int) -> str | None:
        """A sentence with the first reason why this adapter does not fit a Stage C and an image encoder; None if it fits.

        feature_dim: width of the image encoder's hidden states.
        """
        if self.config.feature_dim != feature_dim:
            return (
                f"The IP-Adapter reads hidden states of width {self.config.feature_dim}; the image encoder's have "
                f"{feature_dim}."
            )
        there = attention_blocks(prior)
        for block, width in self.widths.items():
            if not 0 <= block < len(there):
                return f"The IP-Adapter is for attention block {block} of Stage C, which has {len(there)}, from 0."
            if there[block].attention.channels != width:
                return (
                    f"The IP-Adapter was trained for a Stage C of width {width} in attention block {block}; this one has "
                    f"{there[block].attention.channels}."
                )
        return None


def attention_blocks(prior: StableCascadeUNet) -> Sequence[AttnBlock]:
    """Stage C's attention blocks, in the order by which an adapter numbers them."""
    return [block for block in prior.blocks() if isinstance(block, AttnBlock)]


def image_tokens(
    pairs: Mapping[int, tuple[Tensor, Tensor]], conditions: Conditions
) -> dict[int, tuple[ImageTokens, ...]]:
    """Keys and values of one image per sample, as `IPAdapter` makes them, in the form of `Conditions.images`.

    conditions: of Stage C, whose blocks have the same number of heads.
    """
    return {
        block: (ImageTokens(*(split_heads(x, conditions.keys[block].shape[1]) for x in pair)),)
        for block, pair in pairs.items()
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
