"""Weights of which every process has a share, for networks that do not fit a GPU otherwise: torch's FSDP 2."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.options import Options
from training.task import Task
from training.weights.checkpoint import Progress
from training.weights.fsdp import clip, gather_once, local, reshard, shard, share_buffers
from training.weights.sharded_checkpoint import ShardedCheckpoint
from training.weights.trained import Batch, TrainedWeights, make_accelerator


class ShardedWeights(TrainedWeights):
    """Every process has its rows of the weights, of their averages, of the gradients and of the optimizer's state.

    Precision and compiling are those of the units (`fsdp.shard`), not accelerate's.

    Args:
        task: with the same parameters in every process.
        options: of the stage.
        folder: the stage's.
        progress: of the training; saved in checkpoints.
        compiled: whether the units are compiled.

    Raises:
        TrainingError: there is only one process, or the task cannot be sharded.
    """

    agree_every = 1  # steps of large networks take seconds

    def __init__(self, task: Task, options: Options, folder: Path, progress: Progress, *, compiled: bool) -> None:
        accelerator = make_accelerator(options, folder, precision="no", compiled=False)
        task.to(accelerator.device)
        lower = options.precision == "bf16" and accelerator.device.type == "cuda"
        shard(task, torch.bfloat16 if lower else None, compiled=compiled)
        super().__init__(task, options, accelerator)
        self.network = task
        self.checkpoint = ShardedCheckpoint(accelerator, folder, task, self.optimizer, self.ema, progress)
        self.optimizer = accelerator.prepare(self.optimizer)

    def own(self) -> list[nn.Parameter]:
        return local(self.trained)

    def local_gradients(self) -> list[Tensor | None]:
        return [one.to_local() if isinstance(one, DTensor) else one for one in super().local_gradients()]

    def expect(self, example: Callable[[], Batch]) -> None:
        """Shapes do not matter: units are compiled for all."""

    def begin_step(self, learning_rate: float) -> None:
        super().begin_step(learning_rate)
        share_buffers(self.task)

    @contextlib.contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        with self.accelerator.accumulate(self.network):
            gather_once(self.task, last=self.accelerator.sync_gradients)
            yield

    def clip(self) -> None:
        clip(self.trained, self.options.clip)

    @property
    def evaluates(self) -> bool:
        return True

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        reshard(self.task)

    def write(self, model: Path, owner: str) -> None:
        super().write(model, owner)
        if not self.accelerator.is_main_process:
            self.task.save(model)  # gives its rows to the main process
