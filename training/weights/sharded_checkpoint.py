"""Checkpoints of sharded trainings: every process writes its rows, with torch.distributed.checkpoint.

A checkpoint may be continued by another number of processes: rows are distributed again.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from training.errors import FILE_ERRORS, summary
from training.task import Task
from training.weights.checkpoint import Checkpoint, Progress
from training.weights.fsdp import sharded_like, share_buffers

OWN_STATE = re.compile(r"random\.(\d+)\.cpu")


class ShardedCheckpoint(Checkpoint):
    """The checkpoint of a sharded stage.

    Args:
        accelerator, folder: see `Checkpoint`.
        task: sharded.
        optimizer: of its parameters.
        ema: of this process's rows of them (`fsdp.local`).
        progress: of the training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        task: Task,
        optimizer: torch.optim.Optimizer,
        ema: EMAModel,
        progress: Progress,
    ) -> None:
        super().__init__(accelerator, folder)
        self.task, self.optimizer, self.ema, self.progress = task, optimizer, ema, progress

    def _state(self) -> dict[str, Any]:
        """All that is saved. Tensors are in the memory that the training uses, so that loading writes there."""
        parameters = dict(self.task.named_parameters())
        trained = [name for name, one in parameters.items() if one.requires_grad]
        averages = zip(trained, self.ema.shadow_params, strict=True)
        return {
            "parameters": parameters,
            "buffers": dict(self.task.named_buffers()),
            "averages": {name: sharded_like(parameters[name], rows) for name, rows in averages},
            "optimizer": get_optimizer_state_dict(self.task, self.optimizer),
            "steps": {"done": self.progress.step, "averaged": self.ema.optimization_step},
        }

    def _random(self) -> dict[str, dict[str, Tensor]]:
        """The random states of this process."""
        states = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return {str(self.accelerator.process_index): states}

    def _write(self, folder: Path) -> None:
        share_buffers(self.task)  # any process may write a tensor that all have
        try:
            dcp.save({**self._state(), "random": self._random()}, checkpoint_id=folder)
        except CheckpointException as error:
            raise _first(error) from error

    def _read(self, folder: Path) -> int:
        try:
            names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            writers = sum(OWN_STATE.fullmatch(name) is not None for name in names)
            state = self._state()
            if writers == dist.get_world_size():
                state["random"] = self._random()
            dcp.load(state, checkpoint_id=folder)
        except CheckpointException as error:
            raise _first(error) from error
        set_optimizer_state_dict(self.task, self.optimizer, state["optimizer"])
        self.progress.step, self.ema.optimization_step = state["steps"]["done"], state["steps"]["averaged"]
        if "random" in state:
            (states,) = state["random"].values()
            torch.set_rng_state(states["cpu"])
            if "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"])
        return writers


def _first(error: CheckpointException) -> BaseException:
    """The error of one process, of those that torch.distributed.checkpoint collects."""
    found = next(iter(error.failures.values()))[0]
    return found if isinstance(found, FILE_ERRORS) else RuntimeError(summary(found))
