"""CLIP's towers, against transformers' on the same weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from cascade.networks.clip import TextTower, VisionTower

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 24,
}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 11, "bos_token_id": 48, "eos_token_id": 49}
IMAGE = {**SIZES, "image_size": 24, "patch_size": 8}
DTYPES = (torch.float32, torch.bfloat16)


def shuffled(network: nn.Module) -> nn.Module:
    """Random values for all parameters, so that each has an effect."""
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return network.eval()


def texts(end: int) -> Tensor:
    """Three texts of 11 tokens. After their ends, they are padded with the same token."""
    ids = torch.randint(0, 48, (3, 11), generator=torch.Generator().manual_seed(1))
    ids[0, 3:], ids[1, 7:], ids[2, -1] = end, end, end
    return ids


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"hidden_act": "gelu"}, {"hidden_act": "quick_gelu", "eos_token_id": 2}])
def test_texts_equal_transformers(options: dict, dtype: torch.dtype) -> None:
    theirs = shuffled(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | options))).to(dtype)
    ours = TextTower(**TEXT | options).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    ids = texts(49)
    padded = (ids != 49).long()
    for mask in (None, torch.ones_like(ids), padded, padded.roll(1, 1)):
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True)
        made = ours(ids, attention_mask=mask)
        assert len(made.hidden_states) == len(expected.hidden_states) == 3
        assert all(
            torch.equal(one, other) for one, other in zip(made.hidden_states, expected.hidden_states, strict=True)
        )
        assert torch.equal(made.text_embeds, expected.text_embeds)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_equal_transformers(dtype: torch.dtype) -> None:
    theirs = shuffled(CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE))).to(dtype)
    ours = VisionTower(**IMAGE).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    expected, made = theirs(pixels, output_hidden_states=True), ours(pixels)
    assert all(torch.equal(one, other) for one, other in zip(made.hidden_states, expected.hidden_states, strict=True))
    assert torch.equal(made.image_embeds, expected.image_embeds)


@pytest.mark.parametrize(
    ("ours", "theirs", "config", "sizes"),
    [
        (TextTower, CLIPTextModelWithProjection, CLIPTextConfig, TEXT),
        (VisionTower, CLIPVisionModelWithProjection, CLIPVisionConfig, IMAGE),
    ],
)
def test_either_reads_the_others_folder(tmp_path: Path, ours: type, theirs: type, config: type, sizes: dict) -> None:
    first, second = ours(**sizes), theirs(config(**sizes))
    first.save_pretrained(tmp_path / "ours")
    second.save_pretrained(tmp_path / "theirs")
    for network, read in (
        (first, theirs.from_pretrained(tmp_path / "ours")),
        (second, ours.from_pretrained(tmp_path / "theirs")),
    ):
        tensors = read.state_dict()
        assert tensors.keys() == network.state_dict().keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in network.state_dict().items())
    said = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert said["architectures"] == [theirs.__name__]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("text_encoder", CLIPTextConfig), ("image_encoder", CLIPVisionConfig)],
)
def test_defaults_are_those_of_transformers(name: str, expected: type) -> None:
    tower = {"text_encoder": TextTower, "image_encoder": VisionTower}[name]
    with torch.device("meta"):
        config = tower().config
    assert {field: getattr(expected(), field) for field in config} == config


@pytest.mark.parametrize("tower", [TextTower, VisionTower])
def test_wrong_sizes_are_refused(tower: type) -> None:
    with pytest.raises(ValueError, match="num_attention_heads, 5, does not divide hidden_size, 32"):
        tower(**{**(TEXT if tower is TextTower else IMAGE), "num_attention_heads": 5})
    with pytest.raises(ValueError, match="hidden_act is 'tanh'; it must be one of gelu, quick_gelu"):
        tower(**{**(TEXT if tower is TextTower else IMAGE), "hidden_act": "tanh"})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images are \(16, 24\); they must have 24 pixels a side"):
        VisionTower(**IMAGE)(torch.zeros(1, 3, 16, 24))
