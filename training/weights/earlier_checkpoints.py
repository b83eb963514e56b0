"""Reads training checkpoints of earlier versions, in which a UNet's q, k and v, and its timestep mappers, were separate layers.

The model in a checkpoint has the published names, which every version reads. The optimizer's state and the averaged weights are
lists in the order of the parameters; those of an earlier version have one entry for each published tensor.
"""

import itertools
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from cascade.networks.layout import published_names


class Stacking:
    """Joins the entries of a list that has one for each published tensor, so that it has one for each trained parameter."""

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
        """Joins an optimizer's state dict with one group. Scalars, such as the step, are equal for all parts of a parameter."""
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
    """Makes an optimizer and averaged weights load checkpoints of earlier versions too.

    Args:
        task: the networks. Their trained parameters are those of ``optimizer`` and ``ema``, in the same order.
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
