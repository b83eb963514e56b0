"""Notices that what torch has compiled computes wrong gradients, which nothing else shows: the loss is right, and no step fails.

The miniature's Stage C, compiled by torch 2.11 for an H100, had gradients whose error was thirty times their norm, with attention
by cuDNN and donated buffers (`torch_settings`). It diverged in one training of two. Wrong gradients of compiled code are reported
of torch every few months, so what is known today is not enough.
"""

import logging

import torch
from torch import Tensor

from cascade.running.errors import is_out_of_memory
from training.errors import TrainingError
from training.weights.trained import Batch, TrainedWeights

logger = logging.getLogger(__name__)

STEPS = (100, 1000, 10_000)
"""Steps after which gradients are compared. New networks predict zero, and only their last layer has a gradient."""

MOST = 0.25
"""Largest error of the gradient, as a share of its norm. On an H100, bfloat16 alone makes 0.01 (512 pictures)."""


def gradient_error(weights: TrainedWeights, batch: Batch) -> float:
    """How far the compiled gradient of a micro-batch is from that of the same networks, not compiled.

    Neither the weights nor the buffers are changed. All processes call it at the same time.

    Args:
        weights: between two steps, of a task whose forward repeats.
        batch: of a shape that runs compiled.

    Returns:
        ‖compiled - plain‖ / ‖plain‖ over this process's part; NaN or infinite if the compiled gradient is not finite.
    """
    buffers = [(one, one.clone()) for one in weights.task.buffers()]
    compiled = weights.gradients(batch, compiled=True)
    plain = weights.gradients(batch, compiled=False)
    for one, before in buffers:
        one.copy_(before)
    return norm([one - other for one, other in zip(compiled, plain, strict=True)]) / max(norm(plain), 1e-30)


def norm(gradients: list[Tensor]) -> float:
    """Of all tensors together."""
    return torch.stack([torch.linalg.vector_norm(one) for one in gradients]).norm().item()


def check_gradients(weights: TrainedWeights, batch: Batch, name: str, step: int, option: str) -> None:
    """Compares the gradients of a micro-batch.

    A process that is alone does without the comparison if its memory is too small: plain networks need more.

    Args:
        weights, batch: see `gradient_error`.
        name: of the stage.
        step: the number of steps taken.
        option: by which the user compiles.

    Raises:
        TrainingError: they differ, in one process at least.
    """
    accelerator = weights.accelerator
    try:
        error = gradient_error(weights, batch)
    except RuntimeError as failed:
        if accelerator.num_processes > 1 or not is_out_of_memory(failed):
            raise
        logger.warning("%s: the memory is too small to compare the compiled gradients with plain ones.", name)
        return
    finally:
        weights.clear_gradients()
    worst = accelerator.gather(torch.tensor([error], device=accelerator.device))
    if not bool((worst <= MOST).all()):  # NaN too
        raise TrainingError(
            f"{name}: at step {step}, the compiled gradients differ from those of the same network, not compiled, by "
            f"{worst.max().item():.2g} of their norm; at most {MOST} is rounding. The last checkpoint is kept. {option} = "
            "false trains without compiling."
        )
    logger.info(
        "%s: step %d: compiled and plain gradients differ by %.2g of their norm.", name, step, worst.max().item()
    )
