"""The pipeline's only interface to this folder: uploads, CUDA graphs and memory."""

import contextlib
import logging
from collections.abc import Callable, Generator, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cascade.networks.protocol import UNet
from cascade.networks.unet import StableCascadeUNet
from cascade.running.cache import ResidentWeights
from cascade.running.device import current, within
from cascade.running.errors import is_out_of_memory
from cascade.running.graphs import GraphCache, GraphedUNet, OfOneSize
from cascade.running.placement import usable
from cascade.running.retry import Allowances, in_parts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Runner:
    """Runs networks on one device: uploads their weights, replays their CUDA graphs, and retries when memory is short.

    Args:
        device: the device that networks run on.
        weights: uploads their weights; None: all weights stay on the device.
        max_batch: how many pictures are made at a time, while memory suffices.
    """

    def __init__(self, device: torch.device, weights: ResidentWeights | None = None, max_batch: int = 4) -> None:
        self.device = device
        self.weights = ResidentWeights(device) if weights is None else weights
        self.graphs = GraphCache()
        self.max_batch = max_batch
        self.allowances = Allowances(max_batch)

    @property
    def mode(self) -> str:
        """ "resident", "offload" or "stream"."""
        return self.weights.mode

    @property
    def description(self) -> str:
        """The memory mode in a few words, for logs."""
        return self.weights.description

    def unet(self, name: str, network: StableCascadeUNet) -> UNet:
        """Wrap Stage B or C: uploads its weights before it runs, and replays CUDA graphs unless its blocks are streamed."""
        graphs = self.device.type == "cuda" and not self.weights.streams(name)
        return self.weights.wrap(name, GraphedUNet(network, name, self.graphs) if graphs else network)

    def of_one_size(self, network: UNet, size: Hashable) -> UNet:
        """A wrapped Stage B or C whose graphs belong to this size, whatever the picture's: the tiles of all pictures share them.

        Args:
            network: from `unet`.
            size: any key.
        """
        return OfOneSize(network, size, self.graphs)

    def run(self, name: str, function: Callable[..., T], *given: Any) -> T:
        """Return `function(*given)`, which runs the network `name`. Uploads its weights, and replays a graph on a GPU.

        Later calls do not overwrite the results.
        """
        self.weights.use(name)
        return self.graphs.run_copied(name, function, *given)

    def run_for_any_size(self, name: str, function: Callable[..., T], *given: Any) -> T:
        """Like `run`, for a network whose work does not depend on the picture size."""
        with self.graphs.of_no_size():
            return self.run(name, function, *given)

    def prefetch(self, *names: str) -> None:
        """Upload weights that do not overlap the running network's. `names`: the next networks, in their order."""
        self.weights.prefetch(*names)

    def release(self) -> None:
        """Allow uploads to overwrite the weights of the network used last."""
        self.weights.release()

    @contextlib.contextmanager
    def editing(self, name: str, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """A context for changing a network's weights in place.

        Yields:
            The tensors to write to, by the names of the network's parameters. They may be on the host.
        """
        with current(self.device), self.weights.editing(name, network) as tensors:
            yield tensors

    def workspace(self, wanted: int) -> int:
        """How many of the `wanted` bytes are available for temporary work."""
        return self.weights.workspace(wanted)

    @contextlib.contextmanager
    def at(self, size: Hashable, graphs: bool = True) -> Iterator[None]:
        """A context for work on pictures of one size. In it, the device is the current one and graphs belong to that size.

        Args:
            size: (height, width) of the pictures.
            graphs: whether CUDA graphs are used.
        """
        with current(self.device), self.graphs.of(size, graphs):
            yield

    def with_room(self, work: Callable[[], T]) -> T:
        """Return `work()`. If memory is short, drop all graphs and call it again.

        May be called between the steps of a request. Dropped graphs are captured again when they are needed.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not len(self.graphs):
                raise
        self.drop_graphs()
        return work()

    def drop_graphs(self) -> None:
        """Drop all CUDA graphs and free their memory."""
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def job(self, size: tuple[int, int]) -> "Job":
        """Work on pictures of (height, width)."""
        with current(self.device):
            return Job(self, size)


class Job:
    """Work on pictures of one size, in parts that fit into memory. Knows no stage.

    Args:
        runner: runs the networks.
        size: (height, width) of the pictures.
    """

    def __init__(self, runner: Runner, size: tuple[int, int]) -> None:
        self.runner, self.size = runner, size
        self._allowance = runner.allowances.of(size, usable(runner.device))
        self._allocated = self._now_allocated()
        self._old_graphs = len(runner.graphs) > 0

    def at_once(self, count: int) -> int:
        """How many of `count` pictures, or of their pieces, are made at a time."""
        return min(self.runner.max_batch, self._allowance.most, count)

    def iterate(self, work: Generator[T, None, None]) -> Iterator[T]:
        """Iterate over `work`. Its steps run in the context `Runner.at`, and the caller's code outside of it."""
        return within(lambda: self.runner.at(self.size, self._allowance.graphs), work)

    def in_parts(
        self,
        count: int,
        make: Callable[[int, int], Iterator[T]],
        *,
        most: int,
        finished: Callable[[T], bool],
        name: Callable[[int], str],
        pieces: int = 1,
    ) -> Iterator[T]:
        """Make items in parts. When memory is short, make the missing items again with less, see `retry.in_parts`.

        Args:
            count: how many items.
            make: (first, last) -> makes items `first` to `last - 1`, and yields its progress.
            most: how many at a time, at most.
            finished: whether a value that `make` yields finishes an item.
            name: number of items, or of pieces -> text for the log, such as "2 images".
            pieces: how many pieces of a single item are made at a time, at most: `make` asks `at_once`.

        Raises:
            RuntimeError: one item alone exceeds the memory, see `errors.is_out_of_memory`.
        """
        return in_parts(
            count,
            most,
            self._allowance,
            make,
            finished=finished,
            holds_graphs=self._old_graphs,
            make_room=lambda together, remedy: self._make_room(name(together), remedy),
            pieces=pieces,
        )

    def _make_room(self, what: str, remedy: str) -> None:
        self.runner.drop_graphs()
        height, width = self.size
        logger.warning("Out of memory with %s of %dx%d: %s.", what, width, height, remedy)
        if not self._allowance.graphs or self._allowance.most < self.runner.max_batch:
            # Counts this job's own memory as free, because later requests can use it.
            own = self._now_allocated() - self._allocated
            self.runner.allowances.reduce(self.size, self._allowance, usable(self.runner.device) + own)

    def _now_allocated(self) -> int:
        device = self.runner.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
