"""Uploads weights from host memory while the GPU works, and streams a large network's blocks through slots."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from cascade.running.packing import HostWeights

SLOTS = 4
# Bytes per copy. A running copy delays all others to the GPU, such as the next step's noise: 64 MiB take 1.3 ms (H100).
PIECE = 64 * 2**20


class Uploader(Protocol):
    """Copies bytes to a device, in order, while the device works."""

    def mark(self) -> Any:
        """Return an event that all work launched so far is done."""

    def hold(self, mark: Any) -> None:
        """Make later copies wait for an event from `mark`."""

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy of bytes from the host."""

    def uploaded(self) -> Any:
        """Return an event that all copies enqueued so far are done."""

    def wait(self, uploaded: Any) -> None:
        """Make later work wait for an event from `uploaded`."""

    def finish(self) -> None:
        """Return when all copies requested so far are done: the host's bytes may then be changed."""


class CudaUploader:
    """Copies on a separate CUDA stream. The work runs on the current stream.

    Args:
        cache: the tensor that all copies go to.
    """

    def __init__(self, cache: Tensor) -> None:
        self.device = cache.device
        self.stream = torch.cuda.Stream(self.device)
        cache.record_stream(self.stream)  # so that torch does not reuse its memory before the last copy is done

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
    """Copies synchronously, on a device without streams."""

    def mark(self) -> None: ...

    def hold(self, mark: None) -> None: ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def uploaded(self) -> None: ...

    def wait(self, uploaded: None) -> None: ...

    def finish(self) -> None: ...


class BlockStream:
    """Uploads the matrices of a network's blocks into slots before the blocks run.

    Args:
        uploader: copies the matrices.
        sources: each block's bytes on the host.
        slots: parts of the cache. Block i always uses slot i % len(slots).
        condition, forward: the order in which the network's `condition`, and each forward, runs the blocks.
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
        """Mark all slots as empty, because other networks have overwritten them."""
        self.holds: list[int | None] = [None] * len(self.slots)
        self.uploaded: list[Any] = [None] * len(self.slots)

    def start(self) -> None:
        """Start to upload the first blocks. Call it before the network runs."""
        self._ahead([*self.orders["condition"], *self.orders["forward"]])

    def before(self, block: int) -> None:
        """Make the GPU wait for a block's matrices. Call it before the block runs."""
        slot = block % len(self.slots)
        if self.holds[slot] != block:
            self._upload(block)
        self.uploader.wait(self.uploaded[slot])

    def after(self, what: str, block: int) -> None:
        """Upload the next blocks. Call it when `block`, as part of `what` ("condition" or "forward"), has been launched."""
        order = self.orders[what]
        following = (*range(self.position + 1, len(order)), *range(min(self.position + 1, len(order))))
        self.position = next(position for position in following if order[position] == block)
        self._ahead([*order[self.position + 1 :], *self.orders["forward"]])

    def _ahead(self, blocks: Sequence[int]) -> None:
        """Upload the next blocks, up to the first one whose slot an earlier block still needs."""
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
        # Waits for all work launched so far. The slot's last user is usually the latest of it.
        self.uploader.hold(self.uploader.mark())
        self.uploader.upload(self.slots[slot][: len(source)], source)
        self.holds[slot], self.uploaded[slot] = block, self.uploader.uploaded()


def least(weights: HostWeights) -> int:
    """Minimum bytes on the device: the whole network, or if it has blocks, its other tensors and the slots."""
    if not weights.blocks:
        return weights.size
    rest, *blocks = _sizes(weights)
    return rest + sum(_slot_sizes(blocks))


def divide(weights: HostWeights, limit: int) -> tuple[set[int], list[int]]:
    """Choose the blocks that stay on the device, so that they and slots for the other blocks fit into `limit` bytes.

    The chosen blocks are spread evenly over the network, because the others are uploaded while these run.

    Args:
        weights: a network with blocks and more than `limit` bytes.
        limit: at least `least(weights)`.

    Returns:
        The indices of the blocks that stay, and the slots' sizes in bytes.
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
