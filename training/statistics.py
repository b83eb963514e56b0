"""Running statistics of batch normalisations, measured for the averaged weights."""

import math
from collections.abc import Iterable

from torch import Tensor, nn

from training.task import Task

BATCHES = 40
"""Batches on which running statistics are measured; for a small dataset, as many as show each picture twice."""


def refresh_statistics(task: Task, batches: Iterable[dict[str, Tensor]]) -> None:
    """Measures the running statistics of the task's batch normalisations with its present weights.

    Statistics gathered during training belong to weights that changed meanwhile, not to their average. With those, the
    miniature's semantic latents had a standard deviation of 0.73 instead of 1, and its previewer 18.4 dB instead of 28.8.
    """
    norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    task.train()
    for batch in batches:
        task(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def statistics_batches(task: Task, batch_size: int) -> int:
    """The number of batches of ``batch_size`` pictures on which the running statistics are measured."""
    if task.dataset is None:
        return BATCHES
    return min(BATCHES, max(4, math.ceil(2 * len(task.dataset) / batch_size)))
