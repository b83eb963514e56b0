"""The interface of Stages B and C for sampling, with or without uploads and CUDA graphs."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from cascade.networks.unet import Conditions


class UNet(Protocol):
    """Stage B or C: the network itself, or a wrapper that uploads its weights or replays CUDA graphs."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def condition(self, clip_text_pooled: Tensor, **given: Any) -> Conditions: ...

    def __call__(self, sample: Tensor, timestep_ratio: Tensor, conditions: Conditions, **given: Any) -> Tensor: ...
