"""The options of a stage, and its learning rate."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from training.errors import TrainingError
from training.values import Range

RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "gpus", "evaluate_every"), Range(1)),
    **dict.fromkeys(("warmup", "decay", "weight_decay", "checkpoint_seconds"), Range(0)),
    "seed": Range(0, 2**32 - 1),
}


@dataclass(frozen=True)
class Options:
    """How a stage is trained: the table ``[stage] options`` of the configuration file.

    Attributes:
        steps: number of optimizer steps, at least 1.
        batch_size: pictures of the native size in a micro-batch of one process; if ``gpus`` is above 1, of all together.
        learning_rate: the highest. It rises over ``warmup`` steps, stays, and falls to zero along a half cosine over the last
            ``decay`` steps.
        warmup: steps; None: 200, but at most a tenth of all steps.
        decay: steps; 0: the learning rate does not fall. ``warmup`` and ``decay`` together are at most ``steps``.
        weight_decay, beta2: of AdamW.
        clip: highest norm of the gradient.
        accumulate: micro-batches in a step.
        ema: decay of the averaged weights, below 1.
        precision: of matrix products on a GPU, ``bf16``, ``fp16`` or ``no``; a CPU computes in float32.
        compile: whether the network is compiled; ``auto``: on a GPU only. If sharded, its blocks are compiled.
        gpus: GPUs on which `training.recipe` runs the stage, if there are so many. Above 1, any number of processes that divides
            ``batch_size`` trains on the same number of pictures in a step.
        evaluate_every: steps between evaluations; there is always one at the end.
        checkpoint_seconds: seconds between checkpoints.
        sharded: whether the parameters, their averages and the optimizer's state are divided among the processes, see
            `weights.fsdp.shard`; for networks that do not fit a GPU otherwise.
        seed: decides the initial weights and all random draws.

    Raises:
        TrainingError: a value is out of range, warm-up and decay are longer than the training, or a sharded training has fp16.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int | None = None
    decay: int = 0
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.999
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    compile: bool | Literal["auto"] = "auto"
    gpus: int = 1
    evaluate_every: int = 5000
    checkpoint_seconds: float = 60.0
    sharded: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup is None:
            object.__setattr__(self, "warmup", max(0, min(200, self.steps // 10, self.steps - self.decay)))
        for name, allowed in RANGES.items():
            allowed.check(name, getattr(self, name))
        for name in ("beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be greater than 0.")
        if self.sharded and self.precision == "fp16":
            raise TrainingError("precision is 'fp16'; sharded trainings compute in 'bf16' or 'no'.")
        if self.warmup + self.decay > self.steps:
            raise TrainingError(
                f"warmup ({self.warmup}) and decay ({self.decay}) take {self.warmup + self.decay} steps, more than steps, "
                f"{self.steps}: the learning rate would never reach {self.learning_rate}."
            )

    def batch_of_one(self, processes: int) -> int:
        """The pictures in a micro-batch of one of so many processes.

        Raises:
            TrainingError: they cannot have equally many.
        """
        if self.gpus == 1:
            return self.batch_size
        if self.batch_size % processes:
            raise TrainingError(f"batch_size is {self.batch_size}; {processes} processes cannot divide it equally.")
        return self.batch_size // processes

    def samples(self, processes: int) -> int:
        """The pictures of the native size in a step of so many processes."""
        return self.batch_of_one(processes) * processes * self.accumulate

    def scaled(self, steps: int) -> "Options":
        """The options with another number of steps, of which warm-up and decay keep their shares."""
        share = steps / self.steps
        return replace(self, steps=steps, warmup=math.floor(self.warmup * share), decay=math.floor(self.decay * share))


def learning_rate_factor(step: int, options: Options) -> float:
    """The learning rate at ``step`` as a share of the highest: warm-up, plateau, half cosine."""
    factor = min(1.0, (step + 1) / max(1, options.warmup))
    left = options.steps - step
    if options.decay and left < options.decay:
        factor *= 0.5 * (1 - math.cos(math.pi * left / options.decay))
    return factor


def compiles(options: Options, device: torch.device) -> bool:
    """Whether the network is compiled on this device."""
    if options.compile == "auto":
        return device.type == "cuda"
    return options.compile
