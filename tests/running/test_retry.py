"""Parts, retries, and how long reduced limits are kept."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.running.retry import MARGIN, SIZES, Allowance, Allowances, in_parts

SHORT = RuntimeError("CUDA error: out of memory")


class Memory:
    """Memory for `room` items at a time: `with_graphs` fewer while graphs are captured, and `held` fewer while older
    graphs hold memory."""

    def __init__(self, room: float, with_graphs: float = 0, held: float = 0) -> None:
        self.room, self.with_graphs, self.held = room, with_graphs, held
        self.remedies: list[tuple[int, str]] = []

    def make_room(self, together: int, remedy: str) -> None:
        self.held = 0
        self.remedies.append((together, remedy))

    def run(self, count: int, at_once: int, allowance: Allowance, fails_after: int = 0) -> list[int]:
        """Return the indices of the finished items. A batch that does not fit fails after `fails_after` items."""

        def make(first: int, last: int) -> Iterator[int | None]:
            yield None  # a step
            taken = self.with_graphs if allowance.graphs else 0
            for i in range(first, last):
                if last - first > self.room - self.held - taken and i - first >= min(fails_after, last - first - 1):
                    raise SHORT
                yield i

        made = in_parts(
            count,
            at_once,
            allowance,
            make,
            finished=lambda item: item is not None,
            holds_graphs=self.held > 0,
            make_room=self.make_room,
        )
        return [item for item in made if item is not None]


def remedies(memory: Memory) -> list[tuple[int, str]]:
    return [(together, remedy.partition(",")[0]) for together, remedy in memory.remedies]


def test_enough_memory() -> None:
    memory, allowance = Memory(4), Allowance(4)
    assert memory.run(10, 4, allowance) == list(range(10))
    assert memory.remedies == []
    assert (allowance.most, allowance.graphs) == (4, True)


def test_from_the_mildest_remedy_to_the_last() -> None:
    memory, allowance = Memory(1, with_graphs=0.5, held=1), Allowance(4)
    assert memory.run(5, 4, allowance) == list(range(5))
    assert remedies(memory) == [
        (4, "trying again without the CUDA graphs captured so far"),
        (4, "going on with 2 at a time"),
        (2, "going on with 1 at a time"),
        (1, "going on without CUDA graphs"),
    ]
    assert (allowance.most, allowance.graphs) == (1, False)


def test_graphs_of_before_may_be_all_that_was_in_the_way() -> None:
    memory, allowance = Memory(4, held=2), Allowance(4)
    assert memory.run(4, 4, allowance) == list(range(4))
    assert (allowance.most, allowance.graphs) == (4, True)


@settings(deadline=None)
@given(
    count=st.integers(1, 9),
    at_once=st.integers(1, 5),
    room=st.integers(1, 5),
    held=st.integers(0, 2),
    graphs=st.sampled_from([0, 0.5]),
    fails_after=st.integers(0, 3),
)
def test_all_are_made_once_whatever_fits(
    count: int, at_once: int, room: int, held: int, graphs: float, fails_after: int
) -> None:
    memory = Memory(room, graphs, held)
    assert memory.run(count, at_once, Allowance(5), fails_after) == list(range(count))


def test_what_does_not_fit_alone_is_an_error() -> None:
    memory = Memory(0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory.run(4, 4, Allowance(4))
    assert len(memory.remedies) == 3


def test_other_errors_are_not_tried_again() -> None:
    def make(first: int, last: int) -> Iterator[int]:
        yield first
        raise RuntimeError("a kernel failed")

    made = in_parts(
        2, 1, Allowance(1), make, finished=bool, holds_graphs=True, make_room=lambda *_: pytest.fail("no room needed")
    )
    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(made)


def test_what_was_learned_holds_until_more_memory_is_free() -> None:
    allowances = Allowances(4)
    assert allowances.of("size", free=100) is not allowances.of("size", free=100)
    reduced = allowances.of("size", free=100)
    reduced.most = 1
    allowances.reduce("size", reduced, free=100)
    assert allowances.of("size", free=0) is reduced
    assert allowances.of("size", free=100 + MARGIN) is reduced
    assert allowances.of("another size", free=0).most == 4
    assert allowances.of("size", free=101 + MARGIN).most == 4
    assert allowances.of("size", free=0).most == 4, "it has been forgotten"


def test_not_every_size_there_ever_was_is_remembered() -> None:
    allowances = Allowances(4)
    for size in range(2 * SIZES):
        allowances.reduce(size, Allowance(1), free=0)
    assert [allowances.of(size, free=0).most for size in range(2 * SIZES)] == [4] * SIZES + [1] * SIZES
