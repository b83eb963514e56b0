"""The default sampler settings of a model's stages, and those of the published model, with its licence and size."""

import math
from dataclasses import dataclass

from cascade.sampling import SAMPLERS
from cascade.weights.errors import shortened


@dataclass(frozen=True)
class StageSettings:
    """A stage's default sampler settings, used where a request leaves them out.

    Attributes:
        steps: number of steps, at least 1.
        guidance: guidance scale, at least 0; 1 or less turns guidance off.
        shift: shift of the noise schedule, above 0.
        rescale: guidance rescale, 0 to 1, see `sampling.guide`.
        sampler: a key of `sampling.SAMPLERS`.

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """

    steps: int
    guidance: float
    shift: float
    rescale: float
    sampler: str = "ddpm"

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, str) or self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {shortened(repr(self.sampler))}; it must be one of {', '.join(SAMPLERS)}")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"steps is {shortened(repr(self.steps))}; it must be a whole number, at least 1")
        for name, allowed, fits in (
            ("guidance", "at least 0", lambda value: 0 <= value < math.inf),
            ("shift", "above 0", lambda value: 0 < value < math.inf),
            ("rescale", "from 0 to 1", lambda value: 0 <= value <= 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise ValueError(f"{name} is {shortened(repr(value))}; it must be a number {allowed}")


# The authors' text-to-image settings for their own weights.
PUBLISHED_SAMPLER = {
    "prior": StageSettings(steps=20, guidance=4.0, shift=2.0, rescale=0.7),
    "decoder": StageSettings(steps=10, guidance=1.1, shift=1.0, rescale=0.7),
}
PUBLISHED_LICENSE = "Stability AI Non-Commercial Research Community License"
PUBLISHED_SIZE = 1024
# The authors train and decode with 0.43. The published vqgan/config.json has 0.3764, its class's default.
PUBLISHED_STAGE_A_SCALE = 0.43
PUBLISHED_STAGE_A = {"embed_dim": 384, "scale_factor": 0.3764}
"""Width and scale by which a Stage A is taken for the published one, or one that was trained from it."""
