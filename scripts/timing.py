"""Times pieces of work against each other."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def in_turn(pieces: Mapping[str, Callable[[], Any]], runs: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each run of each piece of work, in turn, so that what else changes with time falls on all alike.

    Args:
        pieces: work by name. Each waits for the device, as making pictures does.
        runs: of each.
        warm_up: further runs, first, which do not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in pieces}
    for run, (name, work) in itertools.product(range(runs + warm_up), pieces.items()):
        start = time.perf_counter()
        work()
        if run >= warm_up:
            seconds[name].append(time.perf_counter() - start)
    return seconds


def percent_more(with_it: Sequence[float], without: Sequence[float]) -> list[float]:
    """How much longer the runs of one piece of work take than those of another, in percent: quartiles over the runs."""
    more = [100 * (one / other - 1) for one, other in zip(with_it, without, strict=True)]
    return statistics.quantiles(more, n=4) if len(more) > 1 else more * 3
