"""Uploads from host memory, beside the work on the GPU; and slots through which the blocks of a large network pass."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.running.packing import HostWeights

SLOTS = 4
# A copy that has begun delays all others in its direction, such as the next step's noise: 64 MiB take 1.3 ms (H100).
PIECE = 64 * 2**20


class Uploader(Protocol):
    """Copies to a device, in order, while the device works."""

    def mark(self) -> Any:
        """An event: all work launched so far is done."""

    def hold(self, mark: Any) -> None:
        """Make the copies requested from now on wait for an event of `mark`."""

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Request a copy of bytes from the host."""

    def uploaded(self) -> Any:
        """An event: all copies requested so far are done."""

    def wait(self, uploaded: Any) -> None:
        """Make the work launched from now on wait for an event of `uploaded`."""

    def finish(self) -> None:
        """Return when all copies requested so far are done: the host's bytes may then be changed."""


class CudaUploader:
    """Copies on a CUDA stream of their own; the work is on the current stream.

    Args:
        cache: where all copies go.
    """

    def __init__(self, cache: Tensor) -> None:
        self.device = cache.device
        self.stream = torch.cuda.Stream(self.device)
        cache.record_stream(self.stream)  # so that it is not reused, when dropped, before the last copy

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()

    def hold(self, mark: torch.cuda.Event) -> None:
        self.stream.wait_event(mark)

    def upload(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            for there, here in zip(target.split(PIECE), source.split(PIECE), strict=True):
                there.copy_(here, non_blocking=True)

    def uploaded(self) -> torch.cuda.Event:
        return self.stream.record_event()

    def wait(self, uploaded: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(uploaded)

    def finish(self) -> None:
        self.stream.synchronize()


class DirectUploader:
    """Copies at once, on a device without streams."""

    def mark(self) -> None: ...

    def hold(self, mark: None) -> None: ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def uploaded(self) -> None: ...

    def wait(self, uploaded: None) -> None: ...

    def finish(self) -> None: ...


class BlockStream:
    """Uploads the matrices of a network's blocks into slots, ahead of the blocks that need them.

    Args:
        uploader: copies them.
        sources: each block's bytes on the host.
        slots: parts of the cache; block i always uses slot i modulo their number.
        condition, forward: the blocks in the order in which the network's `condition`, then each forward, runs them.
    """

    def __init__(
        self,
        uploader: Uploader,
        sources: Sequence[Tensor],
        slots: Sequence[Tensor],
        condition: Sequence[int],
        forward: Sequence[int],
    ) -> None:
        self.uploader, self.sources, self.slots = uploader, sources, slots
        self.orders = {"condition": list(condition), "forward": list(forward)}
        self.position = -1
        self.clear()

    def clear(self) -> None:
        """Forget what the slots hold: other networks have overwritten it."""
        self.holds: list[int | None] = [None] * len(self.slots)
        self.uploaded: list[Any] = [None] * len(self.slots)

    def start(self) -> None:
        """Begin to upload: the network is about to run."""
        self._ahead([*self.orders["condition"], *self.orders["forward"]])

    def before(self, block: int) -> None:
        """Wait for a block's matrices: it is about to run."""
        slot = block % len(self.slots)
        if self.holds[slot] != block:
            self._upload(block)
        self.uploader.wait(self.uploaded[slot])

    def after(self, what: str, block: int) -> None:
        """Upload further blocks: one has been launched, as part of "condition" or "forward", and needs its slot no more."""
        order = self.orders[what]
        following = (*range(self.position + 1, len(order)), *range(min(self.position + 1, len(order))))
        self.position = next(position for position in following if order[position] == block)
        self._ahead([*order[self.position + 1 :], *self.orders["forward"]])

    def _ahead(self, blocks: Sequence[int]) -> None:
        """Upload the next blocks, up to the first one whose slot an earlier one still needs."""
        for i, block in enumerate(blocks[: len(self.slots)]):
            held = self.holds[block % len(self.slots)]
            if held == block:
                continue
            if held in blocks[:i]:
                break
            self._upload(block)

    def _upload(self, block: int) -> None:
        slot = block % len(self.slots)
        source = self.sources[block]
        # Waits for all work launched so far, of which the slot's last user is usually the latest.
        self.uploader.hold(self.uploader.mark())
        self.uploader.upload(self.slots[slot][: len(source)], source)
        self.holds[slot], self.uploaded[slot] = block, self.uploader.uploaded()


def least(weights: HostWeights) -> int:
    """Bytes that a network needs on the device at once: all, or if it has blocks, the rest and the slots."""
    if not weights.blocks:
        return weights.size
    rest, *blocks = _sizes(weights)
    return rest + sum(_slot_sizes(blocks))


def divide(weights: HostWeights, limit: int) -> tuple[set[int], list[int]]:
    """Choose the blocks of a network that stay on the device, so that with slots for the others it takes `limit` bytes.

    They are spread evenly over the network: while they run, the others are uploaded.

    Args:
        weights: a network with blocks and more than `limit` bytes.
        limit: at least `least(weights)`.

    Returns:
        The numbers of the blocks that stay, and the slots' sizes in bytes.
    """
    rest, *blocks = _sizes(weights)
    count = len(blocks)
    for number in range(count - 1, -1, -1):
        staying = {i for i in range(count) if i * number // count != (i + 1) * number // count}
        slots = _slot_sizes([size for i, size in enumerate(blocks) if i not in staying])
        if rest + sum(blocks[i] for i in staying) + sum(slots) <= limit:
            break
    return staying, slots


def _sizes(weights: HostWeights) -> list[int]:
    return [last - start for start, last in pairwise(weights.bounds)]


def _slot_sizes(blocks: Sequence[int]) -> list[int]:
    """Bytes of the slots that blocks of these sizes share."""
    return [max(blocks[i::SLOTS]) for i in range(min(SLOTS, len(blocks)))]
