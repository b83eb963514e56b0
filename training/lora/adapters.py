"""PEFT's LoRA layers in our networks.

Networks keep layers of published files as one: q, k and v, and the timestep mappers of all blocks (`networks.layout`). PEFT wraps
the one layer, as the authors' LoRA does with q, k and v. It is split by the rows of its "up" matrix when it is saved; the parts
share "down".
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from training.errors import TrainingError

ADAPTER = "default"
# Stage C's Linear layers, by target; and those of the text encoder that ComfyUI knows by kohya's names.
TARGETS = {
    "text_encoder": r"text_model\.encoder\..*",
    "attention": r".*\.attention\.(to_qkv|to_out\.0)",
    "mlp": r".*\.channelwise\.\d+",
    "conditions": r"clip_.*_mapper|.*\.kv_mapper\.\d+",
    "timesteps": r"timestep_mappers\..*",
    "all": r".*",
}


class Adapted(NamedTuple):
    """The LoRA of one published layer.

    Attributes:
        layer: its published name.
        down: (rank, inputs).
        up: (outputs, rank).
        alpha: the change of the weight is alpha / rank * up @ down.
    """

    layer: str
    down: Tensor
    up: Tensor
    alpha: float


def linear_layers(network: nn.Module, targets: Sequence[str] = ("all",)) -> list[str]:
    """The names of a network's Linear layers that `TARGETS` choose."""
    patterns = [re.compile(TARGETS[target]) for target in targets]
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and any(pattern.fullmatch(name) for pattern in patterns)
    ]


def add_lora(
    network: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0
) -> dict[str, nn.Parameter]:
    """Freezes a network, and gives some of its layers a LoRA in float32, which changes nothing yet.

    The random state decides "down"; "up" is zero.

    Args:
        layers: names of Linear layers; the network must have at least one of them.

    Returns:
        The trained parameters by name: "LAYER.down" and "LAYER.up".

    Raises:
        TrainingError: the network has none of the layers.
    """
    if not layers:
        raise TrainingError(f"{type(network).__name__} has no layers of these targets.")
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        # A regular expression, because PEFT compares a list's entries with the ends of layers' names.
        target_modules="|".join(re.escape(name) for name in layers),
    )
    inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    trained = {}
    for name, layer in _layers(network):
        # Autocast casts the float32 matrices; PEFT would cast inputs to float32, only for autocast to cast them back.
        layer.cast_input_dtype_enabled = False
        for part, module in (("down", layer.lora_A[ADAPTER]), ("up", layer.lora_B[ADAPTER])):
            module.float().requires_grad_(True)
            trained[f"{name}.{part}"] = module.weight
    return trained


def _layers(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def adapted_layers(network: nn.Module) -> list[Adapted]:
    """The LoRAs of a network's published layers, as they are now; on the network's device, float32."""
    stacked = getattr(network, "stacked_layers", {})
    found = []
    for name, layer in _layers(network):
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        alpha = layer.lora_alpha[ADAPTER]
        parts = stacked.get(name, {name: len(up)})
        for part, rows in zip(parts, up.split(list(parts.values())), strict=True):
            found.append(Adapted(part, down.detach().clone(), rows.detach().clone(), float(alpha)))
    return found
