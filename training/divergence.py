"""Notices a diffusion training that has diverged, so that it does not go on for hours with finite weights."""

from collections import deque
from collections.abc import Mapping

FIRST = 1000
"""No judgement before this step: all trainings begin with a network that predicts nothing."""
VALUES = 5
NOTHING = 0.95
"""Predicting zeros has an error of 1, because noise has unit variance. The miniature's Stage C has 0.46 after 60 steps of 64
pictures."""


class Divergence:
    """Watches the error of a network that predicts noise.

    The miniature's Stage C once went on for 34,000 steps with a mean error between 0.9 and 1: the q and k of its first attention
    block had grown steadily to weights of 1.4, and clipping had left all other gradients too small to change a weight.
    """

    def __init__(self) -> None:
        self.errors: deque[float] = deque(maxlen=VALUES)

    def see(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether the network has learned nothing, by the figures of the last steps that were logged.

        Args:
            step: the number of steps taken.
            figures: of this step; "epsilon" is the mean squared error, see `objective.diffusion_losses`. Other tasks lack it.
        """
        if "epsilon" in figures:
            self.errors.append(figures["epsilon"])
        return step >= FIRST and len(self.errors) == VALUES and self.mean >= NOTHING

    @property
    def mean(self) -> float:
        return sum(self.errors) / max(1, len(self.errors))
