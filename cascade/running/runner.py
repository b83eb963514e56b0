"""The front of this folder: all that the pipeline sees of where weights are, how networks run and how much memory there is."""

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
from cascade.running.graphs import GraphCache, GraphedUNet
from cascade.running.placement import usable
from cascade.running.retry import Allowances, in_parts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Runner:
    """Runs networks on one device: uploads their weights, replays their CUDA graphs, and makes do with less when memory is
    short.

    Args:
        device: where networks run.
        weights: where their weights are meanwhile; None: all stay on the device.
        max_batch: how many pictures are made at a time, as long as memory suffices.
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
        """Stage B or C as it runs here: its weights are uploaded before it runs, and its graphs are replayed if the weights
        stay where they are meanwhile."""
        graphs = self.device.type == "cuda" and not self.weights.streams(name)
        return self.weights.wrap(name, GraphedUNet(network, name, self.graphs) if graphs else network)

    def run(self, name: str, function: Callable[..., T], *given: Any) -> T:
        """Return `function(*given)`, which runs a network by name, as a graph on a GPU. Its results are not overwritten."""
        self.weights.use(name)
        return self.graphs.run_copied(name, function, *given)

    def run_for_any_size(self, name: str, function: Callable[..., T], *given: Any) -> T:
        """Like `run`, for a network whose work does not depend on the picture size."""
        with self.graphs.of_no_size():
            return self.run(name, function, *given)

    def prefetch(self, *names: str) -> None:
        """Upload what fits beside the running network. Names the networks that will run next, in this order."""
        self.weights.prefetch(*names)

    def release(self) -> None:
        """Let other networks overwrite the weights of the one that was used last."""
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
        """A context for work on pictures of a size: the device is the current one, and graphs belong to that size.

        Args:
            size: (height, width) of the pictures.
            graphs: whether CUDA graphs are used.
        """
        with current(self.device), self.graphs.of(size, graphs):
            yield

    def with_room(self, work: Callable[[], T]) -> T:
        """Return `work()`. If memory does not suffice, call it again without the graphs captured so far.

        May be called between the steps of a request: its graphs are captured again when needed.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not len(self.graphs):
                raise
        self.drop_graphs()
        return work()

    def drop_graphs(self) -> None:
        """Free the memory that CUDA graphs hold."""
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def job(self, size: tuple[int, int]) -> "Job":
        """Work on pictures of (height, width)."""
        with current(self.device):
            return Job(self, size)


class Job:
    """Work on pictures of one size, in as many parts as memory allows. Knows no stage.

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
        """How many of `count` pictures are made at a time."""
        return min(self.runner.max_batch, self._allowance.most, count)

    def iterate(self, work: Generator[T, None, None]) -> Iterator[T]:
        """Iterate over the work, with each step in the context that it needs and the caller outside of it."""
        return within(lambda: self.runner.at(self.size, self._allowance.graphs), work)

    def in_parts(
        self,
        count: int,
        make: Callable[[int, int], Iterator[T]],
        *,
        most: int,
        finished: Callable[[T], bool],
        name: Callable[[int], str],
    ) -> Iterator[T]:
        """Make things in parts, and when memory does not suffice the missing ones again with less: see `retry.in_parts`.

        Args:
            count: how many things.
            make: (first, last) -> makes the things from `first` to before `last`, and yields as it goes.
            most: how many at a time, at most.
            finished: whether what `make` yields finishes a thing.
            name: so many things, for the log.

        Raises:
            RuntimeError: one thing alone exceeds the memory, see `errors.is_out_of_memory`.
        """
        return in_parts(
            count,
            most,
            self._allowance,
            make,
            finished=finished,
            holds_graphs=self._old_graphs,
            make_room=lambda together, remedy: self._make_room(name(together), remedy),
        )

    def _make_room(self, what: str, remedy: str) -> None:
        self.runner.drop_graphs()
        height, width = self.size
        logger.warning("Out of memory with %s of %dx%d: %s.", what, width, height, remedy)
        if not self._allowance.graphs or self._allowance.most < self.runner.max_batch:
            # What this job has allocated will be free again.
            own = self._now_allocated() - self._allocated
            self.runner.allowances.reduce(self.size, self._allowance, usable(self.runner.device) + own)

    def _now_allocated(self) -> int:
        device = self.runner.device
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
