"""Reads training checkpoints from before a UNet's q, k and v, and its timestep mappers, became single layers.

A checkpoint's model has published names, which any version reads. Its optimizer and its averaged weights are lists, in the order
of the parameters; that of an earlier version has an entry for each published tensor.
"""

import itertools
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from cascade.networks.layout import published_names


class Stacking:
    """From a list with an entry for each published tensor to one with an entry for each trained parameter."""

    def __init__(self, task: nn.Module) -> None:
        names = published_names(task)
        trained = [names[name] for name, parameter in task.named_parameters() if parameter.requires_grad]
        published = set(itertools.chain(*trained))
        place = {key: i for i, key in enumerate(key for key in task.state_dict() if key in published)}
        self.places = [[place[key] for key in keys] for keys in trained]
        self.earlier = len(place)

    def applies(self, entries: int) -> bool:
        return entries == self.earlier != len(self.places)

    def weights(self, weights: list[Tensor]) -> list[Tensor]:
        return [torch.cat([weights[i] for i in places]) for places in self.places]

    def optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state dict with one group. Numbers, such as the step, are the same for all parts of a parameter."""
        before, (group,) = state["state"], state["param_groups"]
        after = {}
        for i, places in enumerate(self.places):
            parts = [before[place] for place in places if place in before]
            if parts:
                after[i] = {
                    key: torch.cat([part[key] for part in parts]) if isinstance(one, Tensor) and one.ndim else one
                    for key, one in parts[0].items()
                }
        return {"state": after, "param_groups": [{**group, "params": list(range(len(self.places)))}]}


def accept_earlier_checkpoints(task: nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel) -> None:
    """Have an optimizer and averaged weights load what an earlier version saved.

    Args:
        task: the networks, whose trained parameters are those of `optimizer` and `ema`, in their order.
    """
    stacking = Stacking(task)
    load = ema.load_state_dict

    def load_optimizer(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries = sum(len(group["params"]) for group in state["param_groups"])
        return stacking.optimizer(state) if stacking.applies(entries) else state

    def load_ema(state: dict[str, Any]) -> None:
        weights = state["shadow_params"]
        load({**state, "shadow_params": stacking.weights(weights)} if stacking.applies(len(weights)) else state)

    optimizer.register_load_state_dict_pre_hook(load_optimizer)
    ema.load_state_dict = load_ema
