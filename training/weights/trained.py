"""What the training loop does with the weights that it trains, in whichever form the processes have them."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from training.errors import writing
from training.files import write_components
from training.options import Options
from training.task import Task
from training.weights.checkpoint import Checkpoint

Batch = dict[str, Tensor]


def make_accelerator(options: Options, folder: Path, *, precision: str, compiled: bool) -> Accelerator:
    """accelerate, set up for one stage.

    Args:
        options: of the stage.
        folder: of the stage; gets the TensorBoard logs.
        precision: "bf16", "fp16" or "no".
        compiled: whether networks that are prepared are compiled.
    """
    # Otherwise a second training of this process could have no other precision, and would be compiled if the first was.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=precision,
        gradient_accumulation_steps=options.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # CUDA graphs ("reduce-overhead"), because launches bound the miniature's steps: Stage B, batch 256, has 33 ms of
        # kernels in a step of 74 ms. Constant sizes, because inductor fails on these networks with dynamic ones (torch 2.11).
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if compiled else "no", mode="reduce-overhead", dynamic=False
        ),
    )


class TrainedWeights(ABC):
    """The trained weights of a stage, their optimizer, averages and checkpoint.

    All processes call the same methods at the same time. A step is `begin_step`, the micro-batches, each in the block of
    `micro_batch`, and `finish_step`.

    Args:
        task: on the training device.
        options: of the stage.
        accelerator: see `make_accelerator`.

    Attributes:
        agree_every: steps after which several processes agree on whether to save or to stop.
        trained: the parameters, as the optimizer has them.
        optimizer: AdamW.
        ema: the averages of `own`.
        network: the task as it is called, see `forward`.
        checkpoint: on disk.
    """

    agree_every: int
    network: nn.Module
    checkpoint: Checkpoint

    def __init__(self, task: Task, options: Options, accelerator: Accelerator) -> None:
        self.task, self.options, self.accelerator = task, options, accelerator
        self.trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        self.settings = {"betas": (0.9, options.beta2), "weight_decay": options.weight_decay}
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=options.learning_rate, fused=accelerator.device.type == "cuda", **self.settings
        )
        self.ema = EMAModel(self.own(), decay=options.ema, use_ema_warmup=True, power=0.75, foreach=True)

    def load(self) -> bool:
        """Loads the checkpoint; False if there is none. Training goes on with these options, not with those that it had.

        Raises:
            TrainingError: it cannot be read, or does not fit the networks.
        """
        if not self.checkpoint.load():
            return False
        self.ema.to(self.accelerator.device)
        self.ema.decay = self.options.ema
        for group in self.optimizer.param_groups:
            group.update(self.settings)
        # accelerate counts micro-batches. A checkpoint lies between steps, also if its steps had another number of them.
        self.accelerator.step = 0
        return True

    @abstractmethod
    def own(self) -> list[nn.Parameter]:
        """This process's part of the trained parameters, in their memory."""

    def finite(self) -> bool:
        """Whether this process's part of the weights is finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.own())

    @abstractmethod
    def expect(self, example: Callable[[], Batch]) -> None:
        """Learns which shapes are usual, from the batch that ``example`` makes, if shapes matter to `forward`."""

    def begin_step(self, learning_rate: float) -> None:
        """Prepares an optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def micro_batch(self, number: int) -> contextlib.AbstractContextManager[None]:
        """A block for the forward and backward pass of a step's micro-batch ``number``, from 0 on. Only the last one's gradients
        are averaged over the processes."""

    def forward(self, batch: Batch) -> Batch:
        """The network's outputs."""
        with self.accelerator.autocast():
            return self.network(**batch)

    def gradients(self, batch: Batch, *, compiled: bool) -> list[Tensor]:
        """This process's part of the gradients of a micro-batch, averaged over the processes: float32, on the CPU.

        For between steps: the parameters' own gradients are overwritten.

        Args:
            batch: of a shape that runs compiled.
            compiled: whether compiled parts run compiled.
        """
        self.clear_gradients()
        with contextlib.nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            outputs = self.forward(batch) if compiled else TrainedWeights.forward(self, batch)
            self.accelerator.backward(outputs["loss"])
        return [
            torch.zeros(1) if one is None else one.to("cpu", torch.float32, copy=True) for one in self.local_gradients()
        ]

    def clear_gradients(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def local_gradients(self) -> list[Tensor | None]:
        """This process's part of the gradients as they are; None for a parameter that has none."""
        return [parameter.grad for parameter in self.trained]

    def finish_step(self) -> None:
        """Clips the gradients, changes the weights, and counts them into their averages."""
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.own())

    @abstractmethod
    def clip(self) -> None:
        """Scales all gradients so that their common norm is at most the option ``clip``."""

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """In the block, the weights are their averages."""
        self.ema.store(self.own())
        self.ema.copy_to(self.own())
        yield
        self.ema.restore(self.own())

    @property
    @abstractmethod
    def evaluates(self) -> bool:
        """Whether this process takes part in evaluations."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block for forward passes without gradients."""
        with torch.no_grad(), self.accelerator.autocast():
            yield

    def write(self, model: Path, owner: str) -> None:
        """Writes the trained components, with the weights as they are, see `files.write_components`.

        Raises:
            TrainingError: they cannot be written.
        """
        if self.accelerator.is_main_process:
            with writing(model):
                write_components(model, owner, self.task.save)
