"""What is done when memory does not suffice: less at a time, then without CUDA graphs. Knows no stage.

What was learned of a size of picture holds for later requests of that size, until more memory is free again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from cascade.running.errors import is_out_of_memory

T = TypeVar("T")

logger = logging.getLogger(__name__)

# How many sizes' lessons are kept.
SIZES = 64
# Bytes. Graphs that are still held, or not any more, move what is free by some tens of MiB from request to request.
MARGIN = 256 * 2**20


@dataclass(eq=False)
class Allowance:
    """What a request may take.

    Attributes:
        most: how many pictures at a time.
        graphs: whether CUDA graphs may be recorded, which keep the memory of what they compute.
        free: bytes that were free when it was last reduced.
    """

    most: int
    graphs: bool = True
    free: int = 0


class Allowances:
    """What requests may take, by the size of their pictures.

    Args:
        most: how many pictures at a time, as long as memory suffices.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._reduced: OrderedDict[Hashable, Allowance] = OrderedDict()

    def of(self, size: Hashable, free: int) -> Allowance:
        """The allowance for a size; free: bytes that are free now."""
        reduced = self._reduced.get(size)
        if reduced is not None and free <= reduced.free + MARGIN:
            return reduced
        if self._reduced.pop(size, None) is not None:
            logger.info("More memory is free than when it was short: trying with all of it again.")
        return Allowance(self.most)

    def reduce(self, size: Hashable, allowance: Allowance, free: int) -> None:
        """Remember an allowance that has been reduced; free: bytes that were free."""
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
) -> Iterator[T]:
    """Make things in parts, and those that are missing again, with less, when memory does not suffice.

    After an error: once more without the graphs recorded so far, if there are any; then with half as many at a time; then,
    one at a time, without recording graphs.

    Args:
        count: how many things.
        at_once: at most so many at a time; fewer if `allowance.most` says so.
        allowance: reduced when memory does not suffice.
        make: (first, last) -> makes the things from `first` to before `last`, and yields as it goes.
        finished: whether what `make` yields finishes a thing. Finished ones are not made again.
        holds_graphs: whether graphs hold memory at the start.
        make_room: called after an error, when nothing that its traceback kept is alive, with how many things were being
            made at a time and what is done about it; gives up all graphs.

    Raises:
        RuntimeError: one thing alone, without graphs, exceeds the memory.
    """
    made = 0
    while made < count:
        last = made + min(at_once, allowance.most, count - made)
        together = last - made
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
                remedy = "trying again without the CUDA graphs recorded so far"
            elif together > 1:
                allowance.most = together // 2
                remedy = f"going on with {allowance.most} at a time"
            elif allowance.graphs:
                allowance.graphs = False
                remedy = "going on without CUDA graphs, more slowly"
            else:
                raise
        if remedy:
            make_room(together, remedy)
