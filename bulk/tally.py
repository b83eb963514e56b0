"""Counts what the workers of a run have done. Ray runs it in a process of its own, which need not import torch for that."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """What is done of the shards that were begun by this call.

    Attributes:
        rows, pictures, failed: rows, pictures, and lines with an error.
    """

    rows: int = 0
    pictures: int = 0
    failed: int = 0

    def __add__(self, other: "Done") -> "Done":
        return Done(self.rows + other.rows, self.pictures + other.pictures, self.failed + other.failed)


class Tally:
    """Counts what the workers have done. An actor of its own, so that it outlives them."""

    def __init__(self) -> None:
        self.finished = Done()
        self.running: dict[int, Done] = {}
        self.attempts: dict[int, int] = {}

    def begin(self, shard: int) -> int:
        """How often the shard was begun, with this time."""
        self.running[shard] = Done()
        self.attempts[shard] = self.attempts.get(shard, 0) + 1
        return self.attempts[shard]

    def report(self, shard: int, rows: int, pictures: int, failed: int) -> None:
        """What is done of a shard."""
        self.running[shard] = Done(rows, pictures, failed)

    def finish(self, shard: int, rows: int) -> None:
        """All rows of a shard are done."""
        last = self.running.pop(shard, Done())
        self.attempts.pop(shard, None)
        self.finished += Done(rows, last.pictures, last.failed)

    def done(self) -> Done:
        """What is done of all shards."""
        return sum(self.running.values(), self.finished)
