"""CUDA graphs: captures a network's forward once per input shape, and replays it without Python.

A step of Stage C launches some 600 kernels: 34 ms one by one, 17 ms as a graph (H100).

Graphs are cached by picture size, which a request sets with `GraphCache.of`. The cache keeps the `SIZES` most recently used
sizes, and the graphs that depend on no size, such as the text encoder's.
"""

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from cascade.kernels.parallel import without_collection
from cascade.networks.protocol import UNet
from cascade.networks.unet import Conditions, StableCascadeUNet
from cascade.running.errors import is_out_of_memory
from cascade.running.waits import one_at_a_time

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

# Picture sizes whose graphs are kept. The least recently used one is dropped first.
SIZES = 8
# Graphs per size. With 1 to 4 pictures at a time, 1 to 4 chunks of text, and each kind of image input, some 40 are in use.
OF_A_SIZE = 48


class Graph(Protocol):
    """A captured function of tensors."""

    def replay(self, inputs: Sequence[Tensor]) -> Any: ...


class CaptureError(RuntimeError):
    """A function cannot be captured as a CUDA graph. The reason is not a lack of memory."""


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all graphs of a device are captured. cuBLAS keeps 32 MiB of workspace for each stream (H100).

    torch's own capture stream serves all devices, and belongs to the device that was used first.
    """
    return torch.cuda.Stream(device)


class CapturedGraph:
    """A CUDA graph, with inputs and outputs at fixed addresses.

    Args:
        function: the function to capture. It is called twice. The first call is not captured, because it may do work that is
            done only once, like compiling kernels.
        inputs: tensors on one device, which must be the current one.
        pool: the memory pool for intermediate results, from `torch.cuda.graph_pool_handle`.

    Raises:
        CaptureError: the function cannot be captured. Later captures work, but need another pool.
        RuntimeError: the function raised it, or memory is short.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: tuple[int, int]) -> None:
        # One capture at a time: models that several threads use share the stream, and before a capture, its thread waits for
        # the whole device. Nor is garbage collected meanwhile, because finalizers may call CUDA.
        with one_at_a_time, without_collection:
            self._capture(function, inputs, pool)

    def _capture(self, function: Function, inputs: Sequence[Tensor], pool: tuple[int, int]) -> None:
        device = inputs[0].device
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.given = [weakref.ref(tensor) for tensor in inputs]
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # a graph allocates from the device, not from torch's cache
        with torch.cuda.stream(stream):
            try:
                # thread_local: allows other threads' work on the GPU meanwhile, such as the health check.
                self.graph.capture_begin(pool, capture_error_mode="thread_local")
                self.outputs = function(*self.inputs)
                self.graph.capture_end()
            except BaseException as error:
                _abandon(self.graph, device, pool)
                if not isinstance(error, Exception) or is_out_of_memory(error):
                    raise
                raise CaptureError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Return the function's results for these tensors. They overwrite the previous results."""
        changed = [i for i, tensor in enumerate(inputs) if self.given[i]() is not tensor]
        if changed:
            torch._foreach_copy_([self.inputs[i] for i in changed], [inputs[i] for i in changed])
            for i in changed:
                self.given[i] = weakref.ref(inputs[i])
        self.graph.replay()
        return self.outputs


# Kept alive, because torch's allocator of pinned memory may still query whether they are being captured.
_abandoned: list[torch.cuda.CUDAGraph] = []


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """Clean up after a failed capture, on the stream where it began.

    If CUDA has invalidated the capture, torch's `capture_end` raises before it tells its allocator that the capture is over.
    Then every later capture into this pool would fail ("already recording to mempool_id"), the pool's memory would never be
    freed, and the default generator would raise (read in torch 2.11).
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):  # raised if `capture_end` has succeeded, so the allocator knows already
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()
    _abandoned.append(graph)
    with contextlib.suppress(RuntimeError):  # a successful capture resets the generator
        number, healing = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        number.add_(1)
        healing.capture_end()


class GraphCache:
    """Runs functions of tensors. On a GPU, captures them as graphs by key and input shapes, and replays them.

    Functions must not wait for the GPU. Tensors that they read besides their arguments must keep their addresses. Callers must
    not change arguments in place between calls. All calls must come from one stream of the current device.

    Args:
        capture: makes a graph from a function, its inputs and a memory pool.
        devices: the device types on which functions are captured.
    """

    def __init__(
        self,
        capture: Callable[[Function, Sequence[Tensor], tuple[int, int]], Graph] = CapturedGraph,
        devices: Sequence[str] = ("cuda",),
    ) -> None:
        self._capture = capture
        self._devices = devices
        # By size (None: no size), then by key and shapes. The most recently used is last in both.
        self._graphs: OrderedDict[Hashable, OrderedDict[Hashable, Graph]] = OrderedDict()
        self._uncapturable: set[Hashable] = set()
        # All graphs share one pool for intermediate results: they are replayed one after the other.
        self._pool: tuple[int, int] | None = None
        self._size: Hashable = None
        self._captures = True

    @contextlib.contextmanager
    def of(self, size: Hashable, captures: bool = True) -> Iterator[None]:
        """A context in which graphs belong to a picture size.

        Args:
            size: any key; None: no size.
            captures: whether to use graphs. A graph keeps the memory of all its intermediate results, so functions run
                without graphs when memory is short.
        """
        before = self._size, self._captures
        self._size, self._captures = size, captures
        try:
            yield
        finally:
            self._size, self._captures = before

    @property
    def captures(self) -> bool:
        """Whether graphs are used in the present context."""
        return self._captures

    def of_no_size(self) -> contextlib.AbstractContextManager[None]:
        """A context in which graphs belong to no picture size, such as the text encoder's."""
        return self.of(None, self._captures)

    @torch.no_grad()
    def run(self, key: Hashable, function: Function, *given: Any) -> Any:
        """Return `function(*given)`. The next call with this key and these shapes overwrites the result.

        A function that cannot be captured runs without a graph, now and later.

        Args:
            key: names the function. All functions with one key must compute the same.
            function: takes and returns tensors, or tuples and dicts of them.
            given: its arguments: tensors, None, constants, and tuples and dicts of them.
        """
        if not self._captures or key in self._uncapturable:
            return function(*given)
        leaves, layout = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors[0].device.type not in self._devices:
            return function(*given)
        described = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        whole_key = key, layout, tuple(described)
        of_size = self._of_this_size()
        if whole_key not in of_size:
            while len(of_size) >= OF_A_SIZE:
                of_size.popitem(last=False)
            try:
                of_size[whole_key] = self._capture(_on_tensors(function, leaves, layout), tensors, self._memory())
            except CaptureError as error:
                self._pool = None
                self._uncapturable.add(key)
                # As text: a log handler that keeps records would keep the error's traceback, which holds tensors.
                why = str(error)
                logger.warning("%s cannot be captured as a CUDA graph, and runs slower without one. %s", key, why)
        if whole_key not in of_size:
            return function(*given)
        of_size.move_to_end(whole_key)
        return of_size[whole_key].replay(tensors)

    def run_copied(self, key: Hashable, function: Function, *given: Any) -> Any:
        """Like `run`, but returns copies that later calls do not overwrite."""
        return tree_map_only(Tensor, Tensor.clone, self.run(key, function, *given))

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._graphs.clear()
        self._pool = None

    def __len__(self) -> int:
        return sum(len(of_size) for of_size in self._graphs.values())

    @property
    def sizes(self) -> list[Hashable]:
        """The picture sizes that have graphs, the most recently used last."""
        return [size for size, of_size in self._graphs.items() if of_size and size is not None]

    def _of_this_size(self) -> OrderedDict[Hashable, Graph]:
        of_size = self._graphs.setdefault(self._size, OrderedDict())
        self._graphs.move_to_end(self._size)
        while sum(size is not None for size in self._graphs) > SIZES:
            del self._graphs[next(size for size in self._graphs if size is not None)]
        return of_size

    def _memory(self) -> tuple[int, int]:
        if self._pool is None or not len(self):  # torch frees the pool with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def _on_tensors(function: Function, leaves: Sequence[Any], layout: TreeSpec) -> Function:
    """Turn a function of nested arguments into one of their tensors alone. Other leaves keep their values."""

    def flattened(*tensors: Tensor) -> Any:
        following = iter(tensors)
        filled = [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return function(*tree_unflatten(filled, layout))

    return flattened


class GraphedUNet:
    """Stage B or C, replayed as CUDA graphs. Called like the network, without gradients.

    Args:
        network: the UNet.
        name: the network's name, a part of its graphs' keys.
        graphs: captures and keeps the graphs.
    """

    def __init__(self, network: StableCascadeUNet, name: str, graphs: GraphCache) -> None:
        self.network = network
        self.name = name
        self.graphs = graphs

    @property
    def config(self) -> Mapping[str, Any]:
        return self.network.config

    def condition(
        self, clip_text_pooled: Tensor, *, latent_size: tuple[int, int] | None = None, **given: Tensor | None
    ) -> Conditions:
        """See `StableCascadeUNet.condition`."""

        def work(given: dict[str, Tensor | None]) -> Conditions:
            return self.network.condition(**given, latent_size=latent_size)

        given = {"clip_text_pooled": clip_text_pooled, **given}
        return self.graphs.run_copied((self.name, "condition", latent_size), work, given)

    def __call__(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        conditions: Conditions,
        *,
        controlnet_residuals: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """See `StableCascadeUNet.forward`. The next call overwrites the result."""

        def work(sample: Tensor, ratio: Tensor, conditions: Conditions, residuals: dict[int, Tensor]) -> Tensor:
            return self.network(sample, ratio, conditions, controlnet_residuals=residuals)

        residuals = dict(controlnet_residuals or {})
        return self.graphs.run((self.name, "step"), work, sample, timestep_ratio, conditions, residuals)


class OfOneSize:
    """A UNet whose graphs belong to one size, also while pictures of other sizes are made.

    Args:
        network: the wrapped UNet.
        size: the size.
        graphs: keeps the graphs of `network`.
    """

    def __init__(self, network: UNet, size: Hashable, graphs: GraphCache) -> None:
        self.network = network
        self.size = size
        self.graphs = graphs

    @property
    def config(self) -> Mapping[str, Any]:
        return self.network.config

    def condition(self, clip_text_pooled: Tensor, **given: Any) -> Conditions:
        """See `StableCascadeUNet.condition`. Its graphs belong to the picture's size."""
        return self.network.condition(clip_text_pooled, **given)

    def __call__(self, sample: Tensor, timestep_ratio: Tensor, conditions: Conditions, **given: Any) -> Tensor:
        """See `StableCascadeUNet.forward`."""
        with self.graphs.of(self.size, self.graphs.captures):
            return self.network(sample, timestep_ratio, conditions, **given)
