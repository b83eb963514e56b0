"""Notices that what torch has compiled computes wrong gradients, which nothing else shows: the loss is right, and no step fails.

The miniature's Stage C, compiled by torch 2.11 for an H100, had gradients whose error was thirty times their norm
(`torch_settings`), and diverged. Wrong gradients of compiled code are reported of torch every few months, so to turn off what is
known today is not enough.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.running.errors import is_out_of_memory
from training.errors import TrainingError
from training.task import Task
from training.weights.trained import Batch, TrainedWeights

logger = logging.getLogger(__name__)

STEPS = (100, 1000, 10_000)
"""Steps after which gradients are compared. New networks predict zero, and only their last layer has a gradient."""

ROUNDING = 0.1
"""Differences up to this share of the gradient's norm are rounding. On an H100, bfloat16 makes 0.01 (512 pictures)."""

LARGEST_ROUNDING = 1 / 512
"""Of a number in bfloat16, as a share of it."""

MOST = 5
"""Larger differences are wrong gradients, if they are more than so many times what rounded weights change."""


@contextlib.contextmanager
def kept_buffers(task: Task) -> Iterator[None]:
    """A block for forward passes after which the task's buffers are what they were."""
    before = [(one, one.clone()) for one in task.buffers()]
    try:
        yield
    finally:
        for one, value in before:
            one.copy_(value)


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    """‖some - others‖ / ‖others‖, of all tensors together; NaN or infinite if ``some`` are not finite."""
    norms = [
        torch.stack([torch.linalg.vector_norm(one) for one in these]).norm().item()
        for these in ([one - other for one, other in zip(some, others, strict=True)], others)
    ]
    return norms[0] / max(norms[1], 1e-30)


@torch.no_grad()
def change_weights(weights: TrainedWeights) -> None:
    """Changes each weight by the largest rounding error of bfloat16, up or down."""
    generator = torch.Generator(weights.accelerator.device).manual_seed(0)
    for one in weights.own():
        up = torch.rand(one.shape, generator=generator, device=one.device) < 0.5
        one.mul_(1 + LARGEST_ROUNDING * (2.0 * up - 1))


def effect_of_rounding(weights: TrainedWeights, batch: Batch, plain: list[Tensor]) -> float:
    """How much rounded weights change the plain gradient ``plain`` of a micro-batch, as a share of it. Weights are restored."""
    before = [one.detach().clone() for one in weights.own()]
    change_weights(weights)
    try:
        return difference(weights.gradients(batch, compiled=False), plain)
    finally:
        with torch.no_grad():
            for one, value in zip(weights.own(), before, strict=True):
                one.copy_(value)


def compare_gradients(weights: TrainedWeights, batch: Batch) -> tuple[float, float]:
    """How far the compiled gradient of a micro-batch is from that of the same networks, not compiled.

    Neither the weights nor the buffers are changed. All processes call it at the same time, and get the same.

    Args:
        weights: between two steps, of a task whose forward repeats.
        batch: of a shape that runs compiled.

    Returns:
        ‖compiled - plain‖ / ‖plain‖ of the worst process, NaN or infinite if the compiled gradient is not finite; and how much of
        it rounding may be, as a share of ‖plain‖ too.
    """

    def worst(value: float) -> float:
        return weights.accelerator.gather(torch.tensor([value], device=weights.accelerator.device)).max().item()

    try:
        with kept_buffers(weights.task):
            compiled = weights.gradients(batch, compiled=True)
            plain = weights.gradients(batch, compiled=False)
            found = worst(difference(compiled, plain))
            if found <= ROUNDING:
                return found, ROUNDING
            return found, max(ROUNDING, MOST * worst(effect_of_rounding(weights, batch, plain)))
    finally:
        weights.clear_gradients()


def check_gradients(weights: TrainedWeights, batch: Batch, name: str, step: int, option: str) -> None:
    """Compares the gradients of a micro-batch; see `compare_gradients`.

    A process that is alone does without if its memory is too small: plain networks need more.

    Args:
        weights, batch: as there.
        name: of the stage.
        step: the number of steps taken.
        option: by which the user compiles.

    Raises:
        TrainingError: they differ, in one process at least.
    """
    try:
        found, most = compare_gradients(weights, batch)
    except RuntimeError as error:
        if weights.accelerator.num_processes > 1 or not is_out_of_memory(error):
            raise
        logger.warning("%s: the memory is too small to compare the compiled gradients with plain ones.", name)
        return
    if not found <= most:  # NaN too
        raise TrainingError(
            f"{name}: at step {step}, the compiled gradients differ from those of the same network, not compiled, by {found:.2g} "
            f"of their norm; up to {most:.2g} may be rounding. The last checkpoint is kept. {option} = false trains without "
            "compiling."
        )
    logger.info("%s: step %d: compiled and plain gradients differ by %.2g of their norm.", name, step, found)
