"""Compares the gradients that a stage is trained with to those of plain float32: ``python -m tests.gpu.gradients CONFIG STAGE
PICTURES OUTPUT``, on one process or several. Prints a JSON list of `Compared`, one for each micro-batch.

The first three micro-batches of a shape are what CUDA graphs treat differently: the first runs, the second is captured, the
third is replayed.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.configuration import read_configuration
from training.options import Options
from training.processes import start_processes
from training.task import Task
from training.trainer import Trainer
from training.workshop import Workshop

BATCHES = 6


@dataclass(frozen=True)
class Compared:
    """How far the gradients of one micro-batch are from the plain ones.

    Attributes:
        shape: of the latents, or of the first tensor of the batch.
        error: ‖trained - plain‖ / ‖plain‖, of all parameters together.
        worst: the parameter with the largest difference, and that difference, over ‖plain‖.
        loss, plain_loss: of this process.
    """

    shape: list[int]
    error: float
    worst: tuple[str, float]
    loss: float
    plain_loss: float


def gradients(task: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, in float32."""
    return {
        name: torch.zeros_like(one, dtype=torch.float32) if one.grad is None else one.grad.float().clone()
        for name, one in task.named_parameters()
        if one.requires_grad
    }


def plain_gradients(task: Task, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients, averaged over the processes, computed in float32 without compiling."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    task.zero_grad(set_to_none=True)
    with sdpa_kernel(SDPBackend.MATH):
        loss = task(**batch)["loss"]
        loss.backward()
    matmul.allow_tf32, convolution.allow_tf32 = before
    found = gradients(task)
    if dist.is_initialized():
        for one in found.values():
            dist.all_reduce(one)
            one /= dist.get_world_size()
    return loss.item(), found


def compare(task: Task, options: Options, folder: Path) -> list[Compared]:
    """Compares `BATCHES` micro-batches. The weights are not changed."""
    plain = copy.deepcopy(task)
    trainer = Trainer(task, options, folder, folder, time.time())
    plain.to(trainer.device).train()
    trainer.weights.network.train()
    compared = []
    for index in range(BATCHES):
        batch = trainer.batch(index)
        plain_loss, expected = plain_gradients(plain, batch)
        with trainer.weights.micro_batch(0):
            loss = trainer.weights.forward(batch)["loss"]
            trainer.accelerator.backward(loss)
        found = gradients(task)
        task.zero_grad(set_to_none=True)
        size = torch.stack([one.norm() for one in expected.values()]).norm().item()
        errors = {name: (found[name] - one).norm().item() / size for name, one in expected.items()}
        name = max(errors, key=errors.get)
        error = sum(one**2 for one in errors.values()) ** 0.5
        shape = list(batch.get("latents", next(iter(batch.values()))).shape)
        compared.append(Compared(shape, error, (name, errors[name]), loss.item(), plain_loss))
    trainer.accelerator.end_training()
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu.gradients")
    parser.add_argument("config", type=Path)
    parser.add_argument("stage")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("output", type=Path, help="a training's folder, with all components in 'model'")
    arguments = parser.parse_args()
    config = read_configuration(arguments.config)
    options = Options(**config[arguments.stage]["options"])
    state = start_processes()
    shop = Workshop(config, arguments.pictures, arguments.output, state.device)
    task = shop.build(arguments.stage, options, resumes=False)
    compared = compare(task, options, arguments.output / f"compared-{arguments.stage}")
    if state.is_main_process:
        print(json.dumps([asdict(one) for one in compared]))


if __name__ == "__main__":
    main()
