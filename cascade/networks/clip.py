"""CLIP's two towers, which turn texts and images into vectors of one space.

Config fields, their defaults, state-dict keys and arithmetic are those of transformers' `CLIPTextModelWithProjection` and
`CLIPVisionModelWithProjection` (openai/CLIP `clip/model.py`), so either reads the other's folders. Those classes are not used
to make pictures: to import them takes 1.6 s of processor time, because transformers imports torch's compiler and its
distributed tensors before its first model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.networks.base import Network, register_to_config


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU with which OpenAI trained CLIP."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


class Encoded(NamedTuple):
    """What a tower makes.

    Attributes:
        hidden_states: the input of the first layer, then each layer's output, (B, S, hidden_size).
        pooled: of the last one, after its norm, what stands for the whole text or image, (B, projection_dim).
    """

    hidden_states: tuple[Tensor, ...]
    pooled: Tensor

    @property
    def text_embeds(self) -> Tensor:
        """`pooled`, as transformers calls it for texts."""
        return self.pooled

    @property
    def image_embeds(self) -> Tensor:
        """`pooled`, as transformers calls it for images."""
        return self.pooled


class Attention(nn.Module):
    """Self-attention of all heads. `mask`, bool, is True where a query sees a key; None: everywhere."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"num_attention_heads, {heads}, does not divide hidden_size, {width}")
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, C) -> (B, S, C); `mask` is (B, 1, S, S)."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A layer: attention and MLP, each on a norm of its input, to which its result is added."""

    def __init__(self, width: int, hidden: int, heads: int, activation: str, epsilon: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = MLP(width, hidden, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=epsilon)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """A tower's layers."""

    def __init__(self, count: int, *sizes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(count))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """Its input and each layer's output, (B, S, C)."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return tuple(states)


class TextEmbeddings(nn.Module):
    """Vectors of tokens and of their places."""

    def __init__(self, vocabulary: int, places: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(places, width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, C)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextModel(nn.Module):
    """The text tower without its projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = TextEmbeddings(config.vocab_size, config.max_position_embeddings, width)
        self.encoder = Layers(*_sizes(config))
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)


class ImageEmbeddings(nn.Module):
    """Vectors of an image's patches, after one for the whole image, and of their places."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.class_embedding, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, image_size, image_size) -> (B, S, C)."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([whole, patches], dim=1) + self.position_embedding.weight


class VisionModel(nn.Module):
    """The vision tower without its projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = ImageEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled so in all files
        self.encoder = Layers(*_sizes(config))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _sizes(config: Any) -> tuple[Any, ...]:
    return (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.hidden_act,
        config.layer_norm_eps,
    )


class Tower(Network):
    """One of the towers, in transformers' files."""

    weights_name = "model"
    kind: str
    twin: str

    def described(self) -> dict[str, Any]:
        """What ``config.json`` tells transformers of the class."""
        return {"architectures": [self.twin], "model_type": self.kind}


class TextTower(Tower):
    """CLIP's text tower.

    Parameters:
        vocab_size (`int`, 49408): tokens, from vector 0 on.
        hidden_size, intermediate_size (`int`): width of the layers, and of their MLPs.
        projection_dim (`int`, 512): length of the pooled vector.
        num_hidden_layers, num_attention_heads (`int`): layers, and heads of each.
        max_position_embeddings (`int`, 77): most tokens of a text.
        hidden_act (`str`, "quick_gelu"): a key of `ACTIVATIONS`.
        layer_norm_eps (`float`, 1e-5): added to variances.
        eos_token_id (`int`, 49407): the first token with this id stands for the text. 2, in old files, means the largest id.

    Raises ValueError for an unknown activation, and if the heads do not divide the width.
    """

    kind = "clip_text_model"
    twin = "CLIPTextModelWithProjection"

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        super().__init__()
        self.text_model = TextModel(self.config)
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        """The tokens' vectors, as a layer."""
        return self.text_model.embeddings.token_embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = True
    ) -> Encoded:
        """Encode texts.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, S), 0 where a token is hidden from the others; None: none is.
            output_hidden_states: ignored; the result always has them. transformers' towers return them only if asked.

        Returns:
            Hidden states (B, S, hidden_size), pooled (B, projection_dim).
        """
        states = self.text_model.encoder(self.text_model.embeddings(input_ids), causal(input_ids, attention_mask))
        last = self.text_model.final_layer_norm(states[-1])
        ids = input_ids.int()  # some devices find no largest int64
        end = self.config.eos_token_id
        place = ids.argmax(-1) if end == 2 else (ids == end).int().argmax(-1)
        whole = last[torch.arange(len(last), device=last.device), place]
        return Encoded(states, self.text_projection(whole))


def causal(ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """bool (B, 1, S, S): a token sees itself and earlier tokens, but none that `attention_mask` hides."""
    length = ids.shape[1]
    places = torch.arange(length, device=ids.device)
    earlier = places[None, :] <= places[:, None]
    if attention_mask is None:
        return earlier.expand(len(ids), 1, length, length)
    return earlier & attention_mask.bool()[:, None, None, :]


class VisionTower(Tower):
    """CLIP's vision tower.

    Parameters:
        hidden_size, intermediate_size (`int`): width of the layers, and of their MLPs.
        projection_dim (`int`, 512): length of the pooled vector.
        num_hidden_layers, num_attention_heads (`int`): layers, and heads of each.
        num_channels (`int`, 3): channels of an image.
        image_size, patch_size (`int`): pixels, the sides of images and of their patches.
        hidden_act (`str`, "quick_gelu"): a key of `ACTIVATIONS`.
        layer_norm_eps (`float`, 1e-5): added to variances.

    Raises ValueError for an unknown activation, and if the heads do not divide the width.
    """

    kind = "clip_vision_model"
    twin = "CLIPVisionModelWithProjection"

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 32,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.vision_model = VisionModel(self.config)
        self.visual_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = True) -> Encoded:
        """Encode images, (B, 3, image_size, image_size), normalised. `output_hidden_states` is ignored, as in `TextTower`.

        Returns:
            Hidden states (B, S, hidden_size), S one more than the patches; pooled (B, projection_dim).

        Raises:
            ValueError: the images have another size.
        """
        side = self.config.image_size
        if pixel_values.shape[-2:] != (side, side):
            raise ValueError(f"images are {tuple(pixel_values.shape[-2:])}; they must have {side} pixels a side.")
        model = self.vision_model
        states = model.encoder(model.pre_layrnorm(model.embeddings(pixel_values)))
        return Encoded(states, self.visual_projection(model.post_layernorm(states[-1][:, 0])))
