"""Weights of which every process has all: torch's DistributedDataParallel, if there are several processes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from training.options import Options
from training.task import Task
from training.weights.checkpoint import Checkpoint, Progress
from training.weights.earlier_checkpoints import accept_earlier_checkpoints
from training.weights.trained import Batch, TrainedWeights, make_accelerator


def shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items()}


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copies gradients to memory of their own, to which those of further micro-batches are added.

    A CUDA graph's outputs are in memory that its next replay overwrites, and autograd makes them gradients without copying them
    (torch 2.11, ``AccumulateGrad``). So the gradient of the first micro-batch would be lost in the second one.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


class ReplicatedWeights(TrainedWeights):
    """Every process has all weights, and its gradients are averaged with the others' once a step.

    Args:
        task: with the same parameters in every process.
        options: of the stage.
        folder: the stage's.
        progress: of the training; saved in checkpoints.
        compiled: whether the network is compiled.
    """

    agree_every = 16

    def __init__(self, task: Task, options: Options, folder: Path, progress: Progress, *, compiled: bool) -> None:
        self.compiled = compiled
        if compiled:
            # Otherwise the network is compiled in parts, so that gradients of one part are averaged while the next is computed.
            # The miniature's gradients are less than the 25 MB of a part.
            torch._dynamo.config.optimize_ddp = False
        precision = options.precision if torch.cuda.is_available() else "no"
        accelerator = make_accelerator(options, folder, precision=precision, compiled=compiled)
        task.to(accelerator.device, memory_format=torch.channels_last)
        super().__init__(task, options, accelerator)
        accept_earlier_checkpoints(task, self.optimizer, self.ema)
        self.network, self.optimizer = accelerator.prepare(task, self.optimizer)
        accelerator.register_for_checkpointing(self.ema, progress)
        self.checkpoint = Checkpoint(accelerator, folder)
        self.usual: dict[str, torch.Size] = {}

    def own(self) -> list[nn.Parameter]:
        return self.trained

    def expect(self, example: Callable[[], Batch]) -> None:
        if self.compiled:
            self.usual = shapes(example())

    @contextlib.contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        with self.accelerator.accumulate(self.network):
            yield
        if number == 0 and self.options.accumulate > 1:
            own_gradients(self.trained)

    def forward(self, batch: Batch) -> Batch:
        """The network's outputs. Only batches of the usual shapes run compiled.

        Other picture sizes are rare, and compiling for one takes as long as thousands of steps (60 to 100 s on an H100).
        """
        if not self.compiled:
            # A task that has compiled parts of its own decides for itself. Forced here, they would run eagerly forward and
            # compiled when gradient checkpointing runs them again, in the backward pass.
            return super().forward(batch)
        torch.compiler.cudagraph_mark_step_begin()  # imports the compiler, for 2 s of a processor
        with torch.compiler.set_stance("default" if shapes(batch) == self.usual else "force_eager"):
            return super().forward(batch)

    def clip(self) -> None:
        self.accelerator.clip_grad_norm_(self.trained, self.options.clip)

    @property
    def evaluates(self) -> bool:
        return self.accelerator.is_main_process
