"""A layer that is changed, wrapped or replaced after loading is never ignored."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cascade.kernels.layers import columns, is_ordinary
from cascade.networks.unet import ResBlock, StableCascadeUNet, TimestepBlock
from tests.components import copied
from tests.networks.adapters import WAYS, Wrapper, linear_layers, small_change, wrap
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

CONFIGS = {"C": STAGE_C, "B": STAGE_B}
NETWORKS = {stage: make(config) for stage, config in CONFIGS.items()}  # tests must not change it
LAYERS = {stage: linear_layers(network) for stage, network in NETWORKS.items()}
CASES = [pytest.param(stage, layer, id=f"{stage}-{layer}") for stage, layers in LAYERS.items() for layer in layers]


def predict(network: StableCascadeUNet, config: dict) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, config.get("in_channels", 16), 8, 8, generator=generator)
    with torch.no_grad():
        return network(sample, torch.tensor([0.3]), **inputs(config, 1))


@pytest.fixture(scope="module")
def before() -> dict[str, Tensor]:
    return {stage: predict(network, CONFIGS[stage]) for stage, network in NETWORKS.items()}


@pytest.mark.parametrize(("stage", "layer"), CASES)
def test_an_adapter_is_the_merged_weight(stage: str, layer: str, before: dict[str, Tensor]) -> None:
    config, network = CONFIGS[stage], NETWORKS[stage]
    name, first, last = LAYERS[stage][layer]
    delta = small_change(network, name, first, last)
    changed = {way: copied(network) for way in WAYS}
    for way, change in WAYS.items():
        change(changed[way], name, delta)
    fresh = StableCascadeUNet(**config).eval()
    fresh.load_state_dict(changed["merge"].state_dict())
    expected = predict(fresh, config)
    assert (expected - before[stage]).norm() > 1e-3 * before[stage].norm()
    for one in changed.values():
        torch.testing.assert_close(predict(one, config), expected, atol=1e-4, rtol=1e-4)


def test_only_what_was_changed_differs_in_the_file() -> None:
    network = make(STAGE_C)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for layer, published in (("to_k", ["to_k.weight"]), ("sca", ["mapper_sca.weight"])):
        other = copied(network)
        name, first, last = LAYERS["C"][layer]
        WAYS["merge"](other, name, small_change(network, name, first, last))
        differ = [key for key, tensor in other.state_dict().items() if not torch.equal(tensor, before[key])]
        blocks = sum(isinstance(block, TimestepBlock) for block in network.blocks()) if layer == "sca" else 1
        assert len(differ) == blocks
        assert {key.rsplit(".", 2)[-2] + "." + key.rsplit(".", 1)[-1] for key in differ} == set(published)


def test_a_wrapped_layer_keeps_its_keys() -> None:
    network = make(STAGE_C)
    name = LAYERS["C"]["to_q"][0]
    before = set(network.state_dict())
    wrap(network, name, torch.zeros(network.get_submodule(name).weight.shape))
    state = network.state_dict()
    gone = {f"{name.removesuffix('to_qkv')}to_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")}
    assert before - set(state) == gone
    assert set(state) - before == {f"{name}.{key}" for key in ("base_layer.weight", "base_layer.bias", "lora.weight")}
    network.load_state_dict(state)


@pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids=["C", "B"])
def test_adapters_are_trained(config: dict) -> None:
    network = make(config).requires_grad_(False)
    layers = linear_layers(network)
    for name in {name for name, _, _ in layers.values()}:
        wrap(network, name, torch.zeros(network.get_submodule(name).weight.shape))
    sample = torch.randn(2, config.get("in_channels", 16), 8, 8)
    network(sample, torch.rand(2), **inputs(config), sca=torch.rand(2)).square().mean().backward()
    adapters = [module for module in network.modules() if isinstance(module, Wrapper)]
    assert len(adapters) == len({name for name, _, _ in layers.values()})
    for adapter in adapters:
        assert adapter.base_layer.weight.grad is None
        assert adapter.lora.weight.grad.abs().sum() > 0


def test_which_layers_are_ordinary() -> None:
    linear = nn.Linear(4, 12)
    assert is_ordinary(linear)
    assert is_ordinary(nn.Conv2d(4, 4, 3))
    for way in ("wrap", "replace_forward", "hook", "parametrise"):
        network = nn.ModuleDict({"layer": copy.deepcopy(linear)})
        WAYS[way](network, "layer", torch.zeros(12, 4))
        assert not is_ordinary(network["layer"])
    for way in ("merge", "exchange_weight", "exchange_layer"):
        network = nn.ModuleDict({"layer": copy.deepcopy(linear)})
        WAYS[way](network, "layer", torch.zeros(12, 4))
        assert is_ordinary(network["layer"])

    class Quantised(Tensor):
        pass

    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    assert not is_ordinary(linear)


def test_columns() -> None:
    x, linear = torch.randn(3, 4), nn.Linear(4, 12)
    torch.testing.assert_close(columns(linear, x, 4, 12), linear(x)[:, 4:])
    torch.testing.assert_close(
        columns(Wrapper(linear, torch.ones(12, 4)), x, 0, 4), (linear(x) + x.sum(1, True))[:, :4]
    )


def test_a_depthwise_convolution_may_be_replaced() -> None:
    network = make(STAGE_C)
    expected = predict(network, STAGE_C)
    for block in network.blocks():
        if isinstance(block, ResBlock):
            block.depthwise = nn.Sequential(block.depthwise, nn.Identity())
    assert torch.equal(predict(network, STAGE_C), expected)
