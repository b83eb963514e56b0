"""The base class of all networks."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class Network(ModelMixin, ConfigMixin):
    """diffusers' base class, with torch's own ways to ask for the device and the dtype, and to change them.

    diffusers' ways serve its offloading and quantisation, which these networks do not use. They import its hooks, and with
    these PEFT and torch's compiler, which takes 2 s, and look through all layers at each call.
    """

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter of a floating-point type."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def to(self, *args: Any, **options: Any) -> "Network":
        """See `torch.nn.Module.to`."""
        return nn.Module.to(self, *args, **options)
