"""Ways in which other libraries change a loaded layer: LoRA by PEFT and by kohya, hooks, parametrisations."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet


class Wrapper(nn.Module):
    """A layer plus a second layer with the same input, as in PEFT."""

    def __init__(self, base_layer: nn.Module, delta: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = nn.Linear(*reversed(delta.shape), bias=False, device=delta.device, dtype=delta.dtype)
        with torch.no_grad():
            self.lora.weight.copy_(delta)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora(x)


class Sum(nn.Module):
    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def wrap(network: nn.Module, name: str, delta: Tensor) -> None:
    network.set_submodule(name, Wrapper(network.get_submodule(name), delta))


def replace_forward(network: nn.Module, name: str, delta: Tensor) -> None:
    layer = network.get_submodule(name)
    forward = layer.forward
    layer.forward = lambda x: forward(x) + F.linear(x, delta)


def hook(network: nn.Module, name: str, delta: Tensor) -> None:
    network.get_submodule(name).register_forward_hook(lambda _, inputs, out: out + F.linear(inputs[0], delta))


def parametrise(network: nn.Module, name: str, delta: Tensor) -> None:
    parametrize.register_parametrization(network.get_submodule(name), "weight", Sum(delta))


def merge(network: nn.Module, name: str, delta: Tensor) -> None:
    with torch.no_grad():
        network.get_submodule(name).weight.add_(delta)


def exchange_weight(network: nn.Module, name: str, delta: Tensor) -> None:
    layer = network.get_submodule(name)
    layer.weight = nn.Parameter(layer.weight.detach() + delta)


def exchange_layer(network: nn.Module, name: str, delta: Tensor) -> None:
    old = network.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, device=delta.device, dtype=delta.dtype)
    new.load_state_dict({"weight": old.weight.detach() + delta, "bias": old.bias.detach()})
    network.set_submodule(name, new)


WAYS: dict[str, Callable[[nn.Module, str, Tensor], None]] = {
    way.__name__: way for way in (wrap, replace_forward, hook, parametrise, merge, exchange_weight, exchange_layer)
}


def linear_layers(network: StableCascadeUNet) -> dict[str, list[tuple[str, int, int]]]:
    """{end of the published name: (layer's name, its rows)} for one layer of each kind."""
    layers: dict[str, tuple[str, int, int]] = {}
    for name, block in network.named_modules():
        if isinstance(block, AttnBlock):
            channels = block.attention.channels
            for i, part in enumerate(("to_q", "to_k", "to_v")):
                layers[part] = (f"{name}.attention.to_qkv", i * channels, (i + 1) * channels)
            layers["to_out.0"] = (f"{name}.attention.to_out.0", 0, channels)
            layers["kv_mapper.1"] = (f"{name}.kv_mapper.1", 0, channels)
        elif isinstance(block, ResBlock):
            for i in (0, 4):
                layers[f"channelwise.{i}"] = (f"{name}.channelwise.{i}", 0, block.channelwise[i].out_features)
    for condition in network.timestep_mappers.names:
        layers[condition] = (
            f"timestep_mappers.{condition}",
            0,
            getattr(network.timestep_mappers, condition).out_features,
        )
    return layers


def small_change(network: StableCascadeUNet, name: str, first: int, last: int) -> Tensor:
    """A change of some rows of a layer's weight; zero elsewhere."""
    weight = network.get_submodule(name).weight
    generator = torch.Generator().manual_seed(3)
    delta = torch.zeros(weight.shape)
    delta[first:last] = 0.5 * weight.float().std().cpu() * torch.randn(delta[first:last].shape, generator=generator)
    return delta.to(weight.device, weight.dtype)
