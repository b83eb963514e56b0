"""Published tensors in state dicts, stacked layers in memory: both directions, partial and wrong state dicts, gradients."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet as Reference
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade.networks import layout
from cascade.networks.base import without_values
from cascade.networks.unet import StableCascadeUNet
from tests.components import copied
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

CONFIGS = [pytest.param(STAGE_C, id="C"), pytest.param(STAGE_B, id="B")]


def predict(network: StableCascadeUNet, config: dict) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, config.get("in_channels", 16), 8, 8, generator=generator)
    with torch.no_grad():
        return network(sample, torch.tensor([0.3, 0.9]), **inputs(config))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("config", CONFIGS)
def test_state_dicts_are_those_of_the_published_layers(config: dict) -> None:
    network, reference = make(config), Reference(**config)
    state = network.state_dict()
    assert list(state) == list(reference.state_dict())  # and in the same order
    assert not {"to_qkv", "timestep_mappers"} & {part for key in state for part in key.split(".")}
    other = StableCascadeUNet(**config).eval()
    result = other.load_state_dict(reference.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(other.state_dict(), reference.state_dict())
    # Nested in another module, as in training.
    both = nn.ModuleDict({"first": copied(network), "second": nn.Linear(1, 1)})
    assert list(both.state_dict()) == [*(f"first.{key}" for key in state), "second.weight", "second.bias"]
    both["first"].load_state_dict(other.state_dict())
    both.load_state_dict({**both.state_dict(), **{f"first.{key}": tensor for key, tensor in state.items()}})
    assert same(both["first"].state_dict(), state)


@pytest.mark.parametrize("config", CONFIGS)
def test_assigned_to_a_network_without_memory(config: dict) -> None:
    network = make(config).to(torch.bfloat16)
    with torch.device("meta"), without_values():
        empty = StableCascadeUNet.from_config(network.config)
    empty.load_state_dict(network.state_dict(), assign=True)
    assert same(empty.state_dict(), network.state_dict())
    assert all(parameter.requires_grad for parameter in empty.parameters())
    assert torch.equal(predict(empty.eval(), config), predict(network, config))


def test_a_state_dict_of_the_stacked_layers() -> None:
    network, other = make(STAGE_B), StableCascadeUNet(**STAGE_B)
    other.load_state_dict({name: parameter.detach() for name, parameter in network.named_parameters()})
    assert same(other.state_dict(), network.state_dict())


def test_changes_in_place_of_published_tensors_reach_the_network() -> None:
    network, fresh = make(STAGE_B), StableCascadeUNet(**STAGE_B).eval()
    before, state = predict(network, STAGE_B), network.state_dict()
    for tensor in state.values():
        tensor.add_(0.1 * torch.randn_like(tensor))
    fresh.load_state_dict(state)
    assert not torch.equal(predict(network, STAGE_B), before)
    assert torch.equal(predict(network, STAGE_B), predict(fresh, STAGE_B))


def test_what_is_missing_or_does_not_fit_is_named_as_published() -> None:
    network = make(STAGE_B)
    attention = "down_blocks.1.2.attention"
    state = dict(network.state_dict())
    key, query = f"{attention}.to_k.weight", f"{attention}.to_q.bias"
    before = state[key].clone()
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}", "down_blocks.0.1.mapper_sca.bias"') as caught:
        network.load_state_dict(
            {name: x for name, x in state.items() if name not in (key, "down_blocks.0.1.mapper_sca.bias")}
        )
    assert "to_qkv" not in str(caught.value)
    with pytest.raises(RuntimeError, match=rf"size mismatch for {query}: .*\[7\].*\[32\]") as caught:
        network.load_state_dict(state | {query: torch.zeros(7)})
    assert "to_qkv" not in str(caught.value)
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{attention}.to_x.weight"'):
        network.load_state_dict(state | {f"{attention}.to_x.weight": torch.zeros(7)})
    # Only some tensors, like an adapter's merged weights.
    value = f"{attention}.to_v.weight"
    result = network.load_state_dict({value: torch.ones(32, 32)}, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(state) - {value}
    assert torch.equal(network.state_dict()[value], torch.ones(32, 32))
    assert torch.equal(network.state_dict()[key], before)
    with torch.device("meta"):
        empty = StableCascadeUNet(**STAGE_B)
    result = empty.load_state_dict({name: x for name, x in state.items() if name != key}, strict=False, assign=True)
    assert result.missing_keys == [key]


def test_saved_by_any_library(tmp_path: Path) -> None:
    """Views of one tensor must not be taken for duplicates."""
    network = make(STAGE_B)
    state = network.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    torch.save(state, tmp_path / "plain.pt")
    network.save_pretrained(tmp_path / "diffusers")
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(network, str(tmp_path / "accelerate"))
    assert same(load_file(tmp_path / "plain.safetensors"), state)
    assert same(torch.load(tmp_path / "plain.pt"), state)
    assert same(load_file(tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"), state)
    assert same(load_file(tmp_path / "accelerate" / "model.safetensors"), state)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}])
def test_from_pretrained(tmp_path: Path, options: dict, shards: bool) -> None:
    network = make(STAGE_B)
    network.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else True
    loaded = StableCascadeUNet.from_pretrained(tmp_path, **options)
    assert same(loaded.state_dict(), network.to(options.get("dtype", torch.float32)).state_dict())


def test_copies_are_independent() -> None:
    network = make(STAGE_B)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    twin = copied(network)
    assert same(twin.state_dict(), before)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert same(network.state_dict(), before)
    twin.load_state_dict(before)
    assert same(twin.state_dict(), before)


def test_state_dicts_outlive_the_network() -> None:
    network = make(STAGE_B)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    state = network.state_dict()
    del network
    assert same(state, before)


def test_gradients_of_published_tensors() -> None:
    """With keep_vars, published tensors have the gradients of diffusers' layers."""
    network, reference = make(STAGE_C), Reference(**STAGE_C).eval()
    reference.load_state_dict(network.state_dict())
    sample, ratio, given = torch.randn(2, 16, 8, 8), torch.rand(2), inputs(STAGE_C)
    network(sample, ratio, **given).square().mean().backward()
    reference(sample, ratio, **given).sample.square().mean().backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    parameters = dict(network.named_parameters())
    for name, published in layout.published_names(network).items():
        together = torch.cat([theirs[one] for one in published])
        torch.testing.assert_close(parameters[name].grad, together, rtol=1e-3, atol=1e-5)
    kept = network.state_dict(keep_vars=True)
    assert kept.keys() == theirs.keys()
    assert all(tensor.requires_grad for tensor in kept.values())
