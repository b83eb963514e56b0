"""Weights in 8 bits: how exact they are, and that a network computes with them as with the matrices that they stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPTextModelWithProjection

from cascade.kernels import plain
from cascade.kernels.plain import dequantise
from cascade.kernels.stream import Stream
from cascade.networks.eight_bits import (
    LARGEST,
    NAMES,
    EightBitLinear,
    group_of,
    quantise,
    rounded_names,
)
from cascade.networks.precisions import bytes_of, network_precision
from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.weights.making import make as make_empty
from cascade.weights.variants import VARIANTS
from tests.components import copied, in_eight_bits_of, restored_from
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

STAGES = pytest.mark.parametrize(
    ("name", "config", "channels"), [("prior", STAGE_C, 16), ("decoder", STAGE_B, 4)], ids=["c", "b"]
)


def matrix(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of unlike sizes, and some large values.
    values = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    return values * torch.where(torch.rand(rows, width, generator=generator) < 0.01, 20.0, 1.0)


@pytest.mark.parametrize(
    ("width", "group"), [(2048, 64), (8192, 64), (1280, 64), (320, 64), (240, 60), (160, 40), (48, 48), (97, 1), (1, 1)]
)
def test_groups_divide_a_row(width: int, group: int) -> None:
    assert group_of(width) == group


@given(rows=st.integers(1, 5), width=st.sampled_from([1, 7, 48, 64, 160, 192]), seed=st.integers(0, 1000))
def test_each_value_is_as_near_as_its_group_allows(rows: int, width: int, seed: int) -> None:
    original = matrix(rows, width, seed)
    weight, scale = quantise(original)
    assert weight.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    assert weight.nbytes + scale.nbytes == bytes_of(original.shape, torch.int8)
    groups = original.unflatten(1, (scale.shape[1], -1))
    assert weight.unflatten(1, (scale.shape[1], -1)).abs().amax(2).min() >= LARGEST - 1
    # Half a step, or what a scale that was rounded down cuts off of the largest.
    step = scale.float().unsqueeze(2)
    error = (dequantise(weight, scale, torch.float32).view(groups.shape) - groups).abs()
    assert (error <= torch.maximum(step / 2, groups.abs() * 2**-8) * 1.0001).all()


def test_the_error_of_normal_weights() -> None:
    """0.57 %, where one scale for rows of 2048 would leave 0.8 %, and e4m3 2.6 %."""
    original = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    left = quantise(original).restored(torch.float32) - original
    assert 0.005 < left.norm() / original.norm() < 0.006


def test_groups_of_zeros_stay_zeros() -> None:
    original = matrix(3, 128)
    original[1, :64] = 0
    assert torch.equal(quantise(original).restored(torch.float32)[1, :64], torch.zeros(64))


def test_values_that_are_not_finite_stay_so() -> None:
    """So that a picture of them is an error, not noise."""
    for value in (torch.inf, torch.nan):
        original = matrix(2, 128)
        original[0, 3] = value
        made = quantise(original).restored(torch.bfloat16)
        assert not made[0, 3].isfinite()
        assert made[1].isfinite().all()


def test_the_dtype_of_the_original_does_not_matter() -> None:
    original = matrix(8, 128).bfloat16()
    for one, other in zip(quantise(original), quantise(original.float()), strict=True):
        assert torch.equal(one, other)


@STAGES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_computes_with_the_matrices(name: str, config: dict, channels: int, dtype: torch.dtype) -> None:
    eight = in_eight_bits_of(make(config).to(dtype), name)
    ordinary = restored_from(eight, make(config).to(dtype))
    given = {key: tensor.to(dtype) for key, tensor in inputs(config).items()}
    sample, time = torch.randn(2, channels, 8, 8), torch.full((2,), 0.3)
    assert network_precision(eight) == "int8"
    assert network_precision(ordinary) == "full"
    with torch.no_grad():
        assert torch.equal(eight(sample, time, **given), ordinary(sample, time, **given))


def test_values_above_float16_are_multiplied_in_float32() -> None:
    network = in_eight_bits_of(make(STAGE_C).half(), "prior")
    block = next(block for block in network.blocks() if isinstance(block, ResBlock))
    for layer in (block.channelwise[0], block.channelwise[4]):
        large = 1e5 * torch.randn(1, 2, 2, layer.in_features)
        weight = dequantise(layer.weight, layer.weight_scale, torch.float32)
        wanted = nn.functional.linear(large, weight, layer.bias.float())
        assert torch.equal(plain.linear(layer, large, torch.float16), wanted)
        stream = torch.randn(1, 2, 2, layer.out_features)
        assert torch.equal(plain.add_linear(Stream(stream), large, layer).settle(), stream + wanted)


def test_which_layers_have_eight_bits() -> None:
    """All Linear layers of all blocks, but the last ResBlock's."""
    eight = in_eight_bits_of(make(STAGE_C), "prior")
    *others, last = (block for block in eight.blocks() if isinstance(block, ResBlock))
    blocks = [*others, *(block for block in eight.blocks() if isinstance(block, AttnBlock))]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    assert {type(layer) for layer in layers} == {EightBitLinear}
    ordinary = [*last.channelwise, eight.timestep_mappers.timestep, eight.clip_txt_mapper]
    assert not any(isinstance(layer, EightBitLinear) for layer in ordinary)


def test_the_last_block_of_the_published_networks() -> None:
    for name, last in (("prior", "up_blocks.1.21."), ("decoder", "up_blocks.3.2.")):
        variant = next(one for one in VARIANTS if one.name == name)
        names = make_empty(variant.network, variant.config).state_dict().keys()
        left = {name for name in names if NAMES.fullmatch(name)} - rounded_names(names, name)
        assert left == {f"{last}channelwise.{number}.weight" for number in (0, 4)}


@pytest.mark.parametrize(
    ("name", "share"), [("prior", 0.96), ("decoder", 0.95), ("text_encoder", 0.9), ("image_encoder", 0.99)]
)
def test_most_of_the_published_weights_have_eight_bits(name: str, share: float) -> None:
    variant = next(one for one in VARIANTS if one.name == name)
    original = make_empty(variant.network, variant.config)
    eight = in_eight_bits_of(original, name)
    weights = sum(parameter.numel() for parameter in original.parameters())
    small = sum(parameter.numel() for parameter in eight.parameters() if parameter.dtype == torch.int8)
    assert small > share * weights


def test_a_text_encoder_computes_with_the_matrices(components: dict) -> None:
    encoder: CLIPTextModelWithProjection = components["text_encoder"]
    eight = in_eight_bits_of(encoder, "text_encoder")
    ordinary = restored_from(eight, encoder)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        made, wanted = eight(tokens), ordinary(tokens)
    assert network_precision(eight) == "int8"
    assert torch.equal(made.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(made.text_embeds, wanted.text_embeds)


def test_a_layer_with_a_hook_is_called() -> None:
    """As by PEFT or a debugger: the matrix is not read past it."""
    eight = in_eight_bits_of(make(STAGE_C), "prior")
    called = []
    for layer in eight.modules():
        if isinstance(layer, EightBitLinear):
            layer.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        eight(torch.randn(2, 16, 8, 8), torch.full((2,), 0.3), **inputs(STAGE_C))
    assert set(called) == {layer for layer in eight.modules() if isinstance(layer, EightBitLinear)}


@STAGES
def test_state_dicts_have_published_names(name: str, config: dict, channels: int) -> None:
    eight = in_eight_bits_of(make(config), name)
    state = eight.state_dict()
    published = make(config).state_dict().keys()
    scales = {key for key in state if key.endswith("weight_scale")}
    assert state.keys() - scales == published
    assert {key.replace("weight_scale", "weight") for key in scales} == {
        key for key, tensor in state.items() if tensor.dtype == torch.int8
    }
    assert any(".to_k." in key for key in scales)
    twin: StableCascadeUNet = copied(eight)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    for key, tensor in twin.state_dict().items():
        assert torch.equal(tensor, state[key]), key
