"""Retries when memory is short: with fewer pictures at a time, then without CUDA graphs. Knows no stage.

The reduced limits of a picture size are kept for later requests of that size, until more memory is free.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cascade.running.errors import is_out_of_memory

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Picture sizes whose reduced limits are kept.
SIZES = 64
# Reduced limits are dropped when this many more bytes are free. Held graphs change free memory by some tens of MiB per request.
MARGIN = 256 * 2**20


@dataclass(eq=False)
class Allowance:
    """Limits of a request.

    Attributes:
        most: how many pictures at a time.
        graphs: whether CUDA graphs may be captured. A graph keeps the memory of its intermediate results.
        free: bytes that were free when a limit was last reduced.
    """

    most: int
    graphs: bool = True
    free: int = 0


class Allowances:
    """Limits of requests, by picture size.

    Args:
        most: how many pictures at a time, while memory suffices.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._reduced: OrderedDict[Hashable, Allowance] = OrderedDict()

    def of(self, size: Hashable, free: int) -> Allowance:
        """The limits for a picture size.

        free: bytes that are free now. Reduced limits are dropped if this is more than when they were reduced.
        """
        reduced = self._reduced.get(size)
        if reduced is not None and free <= reduced.free + MARGIN:
            return reduced
        if self._reduced.pop(size, None) is not None:
            logger.info("More memory is free than when it was short: trying without reduced limits again.")
        return Allowance(self.most)

    def reduce(self, size: Hashable, allowance: Allowance, free: int) -> None:
        """Keep reduced limits for a picture size. free: bytes that were free."""
        allowance.free = free
        self._reduced[size] = allowance
        self._reduced.move_to_end(size)
        while len(self._reduced) > SIZES:
            self._reduced.popitem(last=False)


def in_parts(
    count: int,
    at_once: int,
    allowance: Allowance,
    make: Callable[[int, int], Iterator[T]],
    *,
    finished: Callable[[T], bool],
    holds_graphs: bool,
    make_room: Callable[[int, str], None],
    pieces: int = 1,
) -> Iterator[T]:
    """Make items in parts. When memory is short, make the missing items again with less.

    After an error, retries once without the graphs captured so far, if there are any; then with half as many items at a time;
    then one item at a time without graphs. What is said of items holds for the pieces of a single item, too.

    Args:
        count: how many items.
        at_once: how many at a time, at most. `allowance.most` is a limit, too.
        allowance: reduced when memory is short.
        make: (first, last) -> makes items `first` to `last - 1`, and yields its progress.
        finished: whether a value that `make` yields finishes an item. Finished items are not made again.
        holds_graphs: whether graphs hold memory at the start.
        make_room: (number of items or pieces at a time, remedy) -> drops all graphs and logs. Called after an error, outside
            of the `except` block, so that the traceback no longer keeps tensors alive.
        pieces: how many pieces of an item are made at a time, at most, if it is made alone. `allowance.most` is a limit, which
            `make` must keep to.

    Raises:
        RuntimeError: one item alone, without graphs, exceeds the memory.
    """
    made = 0
    while made < count:
        last = made + min(at_once, allowance.most, count - made)
        together = max(last - made, min(pieces, allowance.most))
        remedy = ""
        try:
            for item in make(made, last):
                made += finished(item)
                yield item
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if holds_graphs:
                holds_graphs = False
                remedy = "trying again without the CUDA graphs captured so far"
            elif together > 1:
                allowance.most = together // 2
                remedy = f"going on with {allowance.most} at a time"
            elif allowance.graphs:
                allowance.graphs = False
                remedy = "going on without CUDA graphs, which is slower"
            else:
                raise
        if remedy:
            make_room(together, remedy)
