"""Products in e4m3: how exact they are, which layers have them, and that nothing else changes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cascade.kernels import plain
from cascade.kernels.e4m3 import E4M3, LARGEST, in_e4m3, multiply, multiply_columns, norm_factor
from cascade.kernels.stream import Product, Stream
from cascade.networks import fp8
from cascade.networks.eight_bits import EightBitLinear, rounded_names
from cascade.networks.fp8 import Fp8Linear
from cascade.networks.precisions import converted, network_precision, rounded, wanted_forms, without_scale
from cascade.networks.unet import AttnBlock, GeluResponse, ResBlock, StableCascadeUNet
from cascade.weights.making import make as make_empty
from cascade.weights.variants import VARIANTS
from tests.components import copied, equal, in_eight_bits_of, restored_from
from tests.networks.test_eight_bits import STAGES, matrix
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make


def error(one: Tensor, other: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@given(rows=st.integers(1, 5), width=st.sampled_from([1, 7, 48, 160]), seed=st.integers(0, 1000))
def test_each_value_is_as_near_as_e4m3_allows(rows: int, width: int, seed: int) -> None:
    original = matrix(rows, width, seed)
    made = fp8.quantise(original)
    weight, scale = made
    assert weight.dtype == E4M3
    assert scale.dtype == torch.float32
    assert scale.shape == (rows, 1)
    assert len(scale.unique()) == 1
    assert weight.float().abs().max() == LARGEST
    # Half of the last of 3 bits; below 2**-6 half of 2**-9.
    allowed = torch.maximum(original.abs() * 2**-4, scale * 2**-10) * 1.0001
    assert ((made.restored(torch.float32) - original).abs() <= allowed).all()


@given(channels=st.integers(2, 4096), seed=st.integers(0, 1000))
def test_no_norm_exceeds_e4m3(channels: int, seed: int) -> None:
    """Not even one of a single large channel. And the factor uses more than half of the range."""
    x = torch.zeros(1, 1, 2, channels)
    x[..., 0, seed % channels] = 1e4
    x[..., 1, :] = torch.randn(channels, generator=torch.Generator().manual_seed(seed))
    largest = (plain.layer_norm(x) * norm_factor(channels)).abs().max()
    assert largest <= LARGEST
    assert math.sqrt(channels) * norm_factor(channels) > LARGEST / 2
    _, made = plain.norm(Stream(x), torch.float32, e4m3=True)
    assert made.dtype == E4M3
    assert made.float().isfinite().all()


def test_what_is_not_finite_stays_so() -> None:
    """So that a picture of it is an error, not noise."""
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.tensor([value, 1.0, 1e9])
        assert in_e4m3(x).float().isfinite().tolist() == [False, True, True]
        original = matrix(2, 32)
        original[0, 3] = value
        made = fp8.quantise(original).restored(torch.float32)
        assert not made.isfinite().any()
    assert torch.equal(fp8.quantise(torch.zeros(2, 16)).restored(torch.float32), torch.zeros(2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, made = in_e4m3(torch.randn(2, 3, 32)), fp8.quantise(torch.randn(48, 32))
    bias = torch.randn(48).to(dtype)
    exact = x.double() @ made.weight.double().T
    tolerance = {"rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 1e-2}
    torch.testing.assert_close(multiply(x, *made, None, dtype).double(), exact * made.scale[0].double(), **tolerance)
    wanted = 0.5 * exact * made.scale.double().T + bias
    torch.testing.assert_close(multiply(x, *made, bias, dtype, 0.5).double(), wanted, **tolerance)
    scale = torch.rand(48, 1)
    wanted = 0.5 * exact * scale.double().T + bias
    made = multiply_columns(x, made.weight, scale, bias, dtype, 0.5)
    torch.testing.assert_close(made.double(), wanted, **tolerance)


@given(
    height=st.integers(1, 12), width=st.integers(1, 12), channels=st.sampled_from([16, 96]), seed=st.integers(0, 1000)
)
def test_responses_in_e4m3(height: int, width: int, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Samples and channels of unlike sizes.
    given = draw(2, height, width, channels) * torch.tensor([1.0, 300.0]).view(2, 1, 1, 1)
    given *= torch.logspace(-2, 1, channels)
    gamma, beta = draw(1, 1, 1, channels), draw(1, 1, 1, channels)
    hidden, of_samples = plain.gelu_response_e4m3(given, gamma, beta)
    assert hidden.dtype == E4M3
    exact = plain.gelu_response(given, gamma, beta).double()
    made = hidden.double() * of_samples.double().view(2, 1, 1, 1)
    bound = LARGEST * of_samples.view(2, 1, 1, 1)
    assert (exact.abs() <= bound * 1.0001).all()
    allowed = torch.maximum(exact.abs() * 2**-4, of_samples.view(2, 1, 1, 1) * 2**-10) * 1.001 + 1e-6 * bound
    assert ((made - exact).abs() <= allowed).all()
    # A sample's result does not depend on its neighbour's.
    alone, of_one = plain.gelu_response_e4m3(given[:1], gamma, beta)
    assert equal(alone, hidden[:1])
    assert torch.equal(of_one, of_samples[:1])


def test_a_pending_product_is_added_with_its_scales() -> None:
    torch.manual_seed(0)
    x, value, bias = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8).bfloat16(), torch.randn(8).bfloat16()
    of_samples, scale, shift = torch.rand(2), torch.randn(2, 8), torch.randn(2, 8)
    added = x.double() + value.double() * of_samples.view(2, 1, 1, 1) + bias
    stream = Stream(x, bias, product=Product(value, of_samples))
    torch.testing.assert_close(stream.settle().double(), added, rtol=1e-5, atol=1e-5)
    wanted = added * (1 + scale.view(2, 1, 1, 8)) + shift.view(2, 1, 1, 8)
    for one in (stream.modulate(scale, shift), Stream(stream.settle()).modulate(scale, shift)):
        torch.testing.assert_close(one.settle().double(), wanted, rtol=1e-5, atol=1e-5)
    twice = stream.modulate(scale, shift).modulate(scale, shift)
    wanted = wanted * (1 + scale.view(2, 1, 1, 8)) + shift.view(2, 1, 1, 8)
    torch.testing.assert_close(twice.settle().double(), wanted, rtol=1e-5, atol=1e-5)


def with_rounded_inputs(fast: StableCascadeUNet, original: StableCascadeUNet) -> StableCascadeUNet:
    """An ordinary network with the matrices of one in fp8, whose layers round what that one rounds."""
    reference = restored_from(fast, original)

    def round_norm(layer: nn.Module, given: tuple[Tensor]) -> Tensor:
        factor = norm_factor(layer.in_features)
        return in_e4m3(given[0] * factor).float() / factor

    def round_response(module: GeluResponse, given: tuple[Tensor], out: Tensor) -> Tensor:
        hidden, of_samples = plain.gelu_response_e4m3(given[0], module.gamma, module.beta)
        return hidden.float() * of_samples[:, None, None, None]

    for name, layer in fast.named_modules():
        if isinstance(layer, Fp8Linear) and name.endswith("channelwise.0"):
            reference.get_submodule(name).register_forward_pre_hook(round_norm)
            reference.get_submodule(f"{name[:-1]}2").register_forward_hook(round_response)
        elif isinstance(layer, Fp8Linear) and name.endswith("to_qkv"):
            attention = reference.get_submodule(name.removesuffix(".to_qkv"))
            attention.register_forward_pre_hook(lambda module, given: (round_norm(module.to_qkv, given), *given[1:]))
    return reference


@STAGES
def test_blocks_round_the_inputs_of_their_products(name: str, config: dict, channels: int) -> None:
    original = make(config)
    fast = in_eight_bits_of(original, name, "fp8")
    assert network_precision(fast) == "fp8"
    blocks = zip(fast.blocks(), with_rounded_inputs(fast, original).blocks(), original.blocks(), strict=True)
    compared = 0
    for several in blocks:
        if not any(isinstance(layer, Fp8Linear) for layer in several[0].modules()):
            continue
        x, given = torch.randn(2, 6, 5, width_of(several[0])), ()
        if isinstance(several[0], AttnBlock):
            tokens = torch.randn(2, 7, 32)
            given = several[2].condition(tokens, several[2].kv_mapper, several[2].attention)
        with torch.no_grad():
            made, wanted, exact = (block(Stream(x), *given).settle() - x for block in several)
        assert error(made, wanted) < 2e-3
        assert 0.01 < error(made, exact) < 0.1
        compared += 1
    assert compared > 3


def width_of(block: ResBlock | AttnBlock) -> int:
    return block.depthwise.out_channels if isinstance(block, ResBlock) else block.attention.channels


@STAGES
def test_predictions(name: str, config: dict, channels: int) -> None:
    original = make(config)
    fast = in_eight_bits_of(original, name, "fp8")
    sample, time = torch.randn(2, channels, 8, 8), torch.full((2,), 0.3)
    with torch.no_grad():
        made, exact = (network(sample, time, **inputs(config)) for network in (fast, original))
    assert 0.005 < error(made, exact) < 0.1


@STAGES
def test_pictures_do_not_depend_on_their_neighbours(name: str, config: dict, channels: int) -> None:
    fast = in_eight_bits_of(make(config), name, "fp8")
    sample, time, given = torch.randn(2, channels, 8, 8), torch.full((2,), 0.3), inputs(config)
    with torch.no_grad():
        first = fast(sample, time, **given)
        sample[1] *= 1000
        second = fast(sample, time, **{key: torch.stack([one[0], 50 * one[1]]) for key, one in given.items()})
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def kinds(network: nn.Module) -> dict[str, type]:
    return {name: type(layer) for name, layer in network.named_modules() if isinstance(layer, EightBitLinear)}


def test_which_layers_multiply_in_e4m3() -> None:
    fast = in_eight_bits_of(make(STAGE_B), "decoder", "fp8")
    found = kinds(fast)
    blocks = fast.blocks()
    last = [block for block in blocks if isinstance(block, ResBlock)][-1]
    for name, block in fast.named_modules():
        if isinstance(block, AttnBlock):
            assert found.pop(f"{name}.attention.to_qkv") is Fp8Linear
            assert found.pop(f"{name}.kv_mapper.1") is EightBitLinear
            assert type(block.attention.to_out[0]) is nn.Linear
        elif isinstance(block, ResBlock):
            level = fast.get_submodule(name.rpartition(".")[0])
            skip = block.channelwise[0].in_features > block.depthwise.out_channels
            wanted = any(isinstance(one, AttnBlock) for one in level) and not skip and block is not last
            for number in (0, 4):
                assert (found.pop(f"{name}.channelwise.{number}", None) is Fp8Linear) == wanted, name
    assert not found


@pytest.mark.parametrize("widths", [(24, 24), (32, 40)])
def test_shapes_that_gpus_cannot_multiply_stay_as_they_are(widths: tuple[int, int]) -> None:
    config: dict[str, Any] = STAGE_C | {"block_out_channels": widths}
    fast = in_eight_bits_of(make(config), "prior", "fp8")
    for name, kind in kinds(fast).items():
        layer = fast.get_submodule(name)
        fits = layer.in_features % 16 == layer.out_features % 16 == 0
        assert kind is EightBitLinear or fits, name
    assert (Fp8Linear in kinds(fast).values()) == (32 in widths)
    with torch.no_grad():
        assert fast(torch.randn(2, 16, 8, 8), torch.full((2,), 0.3), **inputs(config)).isfinite().all()


def test_the_published_networks() -> None:
    """Four fifths of Stage C's weights are multiplied in e4m3. What a picture needs is as large as docs/experiments.md says."""
    total = 0.0
    # Levels without attention are those of Stage B at the highest resolutions.
    without_attention = {"prior": (), "decoder": ("down_blocks.0.", "down_blocks.1.", "up_blocks.2.", "up_blocks.3.")}
    for name, share in (("prior", 0.8), ("decoder", 0.77), ("text_encoder", 0), ("vqgan", 0)):
        variant = next(one for one in VARIANTS if one.name == name)
        network = make_empty(variant.network, variant.config).to(torch.bfloat16)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        fast = in_eight_bits_of(network, name, "fp8")
        sizes = [parameter.numel() for parameter in fast.parameters() if parameter.dtype == E4M3]
        assert sum(sizes) >= share * sum(parameter.numel() for parameter in network.parameters())
        total += sum(parameter.nbytes for parameter in fast.parameters())
        if name in without_attention:
            left = rounded_names(shapes, name) - wanted_forms(shapes, name, "fp8").keys()
            left = {one for one in left if "to_out" not in one and not one.startswith(without_attention[name])}
            # The ResBlock with a skip connection.
            assert left == {f"up_blocks.1.0.channelwise.{number}.weight" for number in (0, 4)}
    assert round(total / 2**30, 2) == 6.20


@STAGES
def test_hooked_layers_are_called(name: str, config: dict, channels: int) -> None:
    """As by PEFT or a debugger. They get and return floating point, and compute with the matrix."""
    fast = in_eight_bits_of(make(config), name, "fp8")
    called = []

    def note(layer: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        called.append(layer)
        assert given[0].dtype == out.dtype == torch.float32

    for layer in fast.modules():
        if isinstance(layer, Fp8Linear):
            layer.register_forward_hook(note)
    ordinary = in_eight_bits_of(make(config), name, "fp8")
    ordinary.load_state_dict(fast.state_dict())
    sample, time, conditions = torch.randn(2, channels, 8, 8), torch.full((2,), 0.3), inputs(config)
    with torch.no_grad():
        made = fast(sample, time, **conditions)
        reference = restored_from(ordinary, make(config))(sample, time, **conditions)
    assert set(called) == {layer for layer in fast.modules() if isinstance(layer, Fp8Linear)}
    assert torch.equal(made, reference)


def test_a_hook_between_the_layers_is_called() -> None:
    fast = in_eight_bits_of(make(STAGE_C), "prior", "fp8")
    called = []
    for block in fast.blocks():
        if isinstance(block, ResBlock):
            block.channelwise[2].register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad():
        fast(torch.randn(2, 16, 8, 8), torch.full((2,), 0.3), **inputs(STAGE_C))
    assert len(called) == sum(isinstance(block, ResBlock) for block in fast.executed())


def test_gradients_pass_through_the_matrices() -> None:
    fast = in_eight_bits_of(make(STAGE_C), "prior", "fp8")
    samples = [torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for sample, network in zip(samples, (fast, restored_from(fast, make(STAGE_C))), strict=True):
        sample.requires_grad_()
        network(sample, torch.full((2,), 0.3), **inputs(STAGE_C)).square().sum().backward()
    assert samples[0].grad.abs().sum() > 0
    assert torch.equal(samples[0].grad, samples[1].grad)


@STAGES
def test_state_dicts_have_published_names(name: str, config: dict, channels: int) -> None:
    fast = in_eight_bits_of(make(config), name, "fp8")
    state = fast.state_dict()
    scales = {key for key in state if key.endswith("weight_scale")}
    assert state.keys() - scales == make(config).state_dict().keys()
    assert {key.replace("weight_scale", "weight") for key in scales} == {
        key for key, tensor in state.items() if tensor.dtype in (torch.int8, E4M3)
    }
    twin = copied(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    for key, tensor in twin.state_dict().items():
        assert equal(tensor, state[key]), key


def test_one_form_becomes_another() -> None:
    """As when weights that are stored in one precision are loaded in another."""
    state = make(STAGE_C).state_dict()
    shapes = {key: tensor.shape for key, tensor in state.items()}
    fast, small = (in_eight_bits_of(make(STAGE_C), "prior", one).state_dict() for one in ("fp8", "int8"))
    for one in (fast, small):
        for precision in ("fp8", "int8", "full"):
            forms = wanted_forms(shapes, "prior", precision)
            made = converted(rounded(one, without_scale(forms, one)), forms, torch.bfloat16)
            assert {key for key in made if key.endswith("weight_scale")} == {f"{key}_scale" for key in forms}
            for key, tensor in made.items():
                assert key not in forms or tensor.dtype == forms[key]
            matrices = converted(made, {}, torch.float32)
            for key, tensor in state.items():
                assert error(matrices[key], tensor) < 0.045, key
    same = converted(fast, wanted_forms(shapes, "prior", "fp8"), torch.float32)
    assert all(tensor is fast[key] for key, tensor in same.items())
