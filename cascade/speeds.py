"""What the values of `Request.speed` mean: the settings of a stage that a request leaves open."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL_STEPS = (0.0, 1.0)


@dataclass(frozen=True)
class Speed:
    """The settings of a speed, where neither a request nor a smaller number of steps of the model's own overrides them.

    Attributes:
        prior, decoder: attributes of `weights.StageSettings` for Stages C and B.
        interval: see `Request.guidance_interval`.
        distilled: whether it needs the model folder's distilled weights.
    """

    prior: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] = ALL_STEPS
    distilled: bool = False


# docs/experiments.md has the measurements.
SPEEDS: dict[str, Speed] = {
    "exact": Speed(),
    "fast": Speed({"steps": 10, "sampler": "ddim_cosine"}, {"steps": 5, "sampler": "ddim_cosine"}),
    "turbo": Speed(
        {"steps": 4, "guidance": 1.0, "sampler": "ddim_cosine"},
        {"steps": 3, "guidance": 1.0, "sampler": "ddim_cosine"},
        distilled=True,
    ),
}
