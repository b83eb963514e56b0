"""CUDA graphs: the kernels of a network's forward, captured once for inputs of some shapes and replayed without Python.

A step of Stage C launches some 600 kernels. Launched one by one they take 34 ms on an H100, by a graph 17.

A graph belongs to a size of picture: a request sets it with `Recorder.of`. The graphs of the `SIZES` sizes used last are
kept, whatever kinds of request there were; what depends on no size, such as text, is kept beside them.
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

from cascade.networks.unet import Conditions, StableCascadeUNet
from cascade.running.errors import is_out_of_memory

logger = logging.getLogger(__name__)

Function = Callable[..., Any]

# Sizes of picture whose graphs are kept; the one that was used least recently makes room.
SIZES = 8
# Graphs of one size: with 1 to 4 pictures at a time, guidance or not, and each kind of image input, some 20 are in use.
OF_A_SIZE = 32


class Recording(Protocol):
    """A function of tensors that can be replayed."""

    def replay(self, inputs: Sequence[Tensor]) -> Any: ...


class CaptureError(RuntimeError):
    """A function cannot be captured as a CUDA graph, for another reason than a lack of memory."""


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs of a device are captured. One for all: cuBLAS keeps 32 MiB of workspace for each stream (H100).

    torch's own stream for captures is one for all devices, and lies on the device that was used first.
    """
    return torch.cuda.Stream(device)


class GraphRecording:
    """A CUDA graph, with its inputs and outputs at their fixed places.

    Args:
        function: what is captured. It is called twice: the first time outside of the graph, as what is done only once,
            like compiling kernels, must not be captured.
        inputs: tensors of one device, which is the current one.
        pool: the memory of the graph's intermediate results, by `torch.cuda.graph_pool_handle`.

    Raises:
        CaptureError: the function cannot be captured. Nothing is left that would hinder another capture, but for the
            pool, which must not be used for another.
        RuntimeError: of the function itself; or memory does not suffice.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: tuple[int, int]) -> None:
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
        torch.cuda.empty_cache()  # a graph's memory comes from the device, not from what torch holds for others
        with torch.cuda.stream(stream):
            try:
                # thread_local: what other threads do on the GPU meanwhile, such as the health check, is no error.
                self.graph.capture_begin(pool, capture_error_mode="thread_local")
                self.outputs = function(*self.inputs)
                self.graph.capture_end()
            except BaseException as error:
                _abandon(self.graph, device, pool)
                if not isinstance(error, Exception) or is_out_of_memory(error):
                    raise
                raise CaptureError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """What the function returns for these tensors, in the place of what it returned last."""
        changed = [i for i, tensor in enumerate(inputs) if self.given[i]() is not tensor]
        if changed:
            torch._foreach_copy_([self.inputs[i] for i in changed], [inputs[i] for i in changed])
            for i in changed:
                self.given[i] = weakref.ref(inputs[i])
        self.graph.replay()
        return self.outputs


# torch's allocator of pinned memory may go on asking these whether they are being captured.
_abandoned: list[torch.cuda.CUDAGraph] = []


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """Undo what a capture that failed has begun, on the stream that it was begun on.

    torch's `capture_end` gives up where CUDA says that the capture was invalidated, before it tells its allocator that
    the capture is over: every later capture into this pool would fail ("already recording to mempool_id"), the pool's
    memory would never be freed, and the default generator would refuse to work (read in torch 2.11).
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError):  # it was told, if the capture itself was whole
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with contextlib.suppress(RuntimeError):
        graph.reset()
    _abandoned.append(graph)
    with contextlib.suppress(RuntimeError):  # a whole capture brings the generator back
        number, healing = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        healing.capture_begin(capture_error_mode="thread_local")
        number.add_(1)
        healing.capture_end()


class Recorder:
    """Runs functions of tensors, and on a GPU records them as graphs, by a key and the tensors' shapes.

    The functions wait for nothing, and what they read besides their tensors stays where it is. The tensors that are given
    are not changed in place between calls. All calls come from one stream of one device, the current one.

    Args:
        record: makes a recording of a function, its inputs and a pool of memory.
        devices: the types of device on which functions are recorded.
    """

    def __init__(
        self,
        record: Callable[[Function, Sequence[Tensor], tuple[int, int]], Recording] = GraphRecording,
        devices: Sequence[str] = ("cuda",),
    ) -> None:
        self._record = record
        self._devices = devices
        # By size, None for what has no size, those used last at the end; then by key and shapes, likewise.
        self._recordings: OrderedDict[Hashable, OrderedDict[Hashable, Recording]] = OrderedDict()
        self._unrecordable: set[Hashable] = set()
        # One memory for the intermediate results of all graphs: they are replayed one after the other.
        self._pool: tuple[int, int] | None = None
        self._size: Hashable = None
        self._records = True

    @contextlib.contextmanager
    def of(self, size: Hashable, records: bool = True) -> Iterator[None]:
        """A context in which graphs belong to a size of picture, None: to no size.

        records: whether functions are recorded. A graph keeps the memory of all that it computes; where that is short,
            they run without.
        """
        before = self._size, self._records
        self._size, self._records = size, records
        try:
            yield
        finally:
            self._size, self._records = before

    @property
    def records(self) -> bool:
        """Whether functions are recorded, in the present context."""
        return self._records

    def of_no_size(self) -> contextlib.AbstractContextManager[None]:
        """A context in which graphs belong to no size of picture: a text's are the same for all."""
        return self.of(None, self._records)

    @torch.no_grad()
    def run(self, key: Hashable, function: Function, *given: Any) -> Any:
        """What `function(*given)` returns. The next call with this key and such arguments overwrites it.

        A function that cannot be captured is run plainly, now and later.

        Args:
            key: names the function.
            function: takes tensors, and tuples and dicts of them, and returns such. Two functions with a key do the same.
            given: its arguments; in tuples and dicts, None and other constants may stand for a tensor.
        """
        if not self._records or key in self._unrecordable:
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
                of_size[whole_key] = self._record(_on_tensors(function, leaves, layout), tensors, self._memory())
            except CaptureError as error:
                self._pool = None
                self._unrecordable.add(key)
                # As text: a log that keeps its records would keep the error's traceback, and so tensors.
                why = str(error)
                logger.warning("%s cannot be captured as a CUDA graph and runs without, more slowly. %s", key, why)
        if whole_key not in of_size:
            return function(*given)
        of_size.move_to_end(whole_key)
        return of_size[whole_key].replay(tensors)

    def run_once(self, key: Hashable, function: Function, *given: Any) -> Any:
        """As `run`, but returns copies, which later calls do not overwrite."""
        return tree_map_only(Tensor, Tensor.clone, self.run(key, function, *given))

    def clear(self) -> None:
        """Forget all graphs: their memory is needed."""
        self._recordings.clear()
        self._pool = None

    def __len__(self) -> int:
        return sum(len(of_size) for of_size in self._recordings.values())

    @property
    def sizes(self) -> list[Hashable]:
        """The sizes that have graphs, the one that was used last at the end."""
        return [size for size, of_size in self._recordings.items() if of_size and size is not None]

    def _of_this_size(self) -> OrderedDict[Hashable, Recording]:
        of_size = self._recordings.setdefault(self._size, OrderedDict())
        self._recordings.move_to_end(self._size)
        while sum(size is not None for size in self._recordings) > SIZES:
            del self._recordings[next(size for size in self._recordings if size is not None)]
        return of_size

    def _memory(self) -> tuple[int, int]:
        if self._pool is None or not len(self):  # torch gives the memory away with the last graph
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def _on_tensors(function: Function, leaves: Sequence[Any], layout: TreeSpec) -> Function:
    """The function of the tensors alone that stand among the leaves."""

    def flattened(*tensors: Tensor) -> Any:
        following = iter(tensors)
        filled = [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return function(*tree_unflatten(filled, layout))

    return flattened


class GraphedUNet:
    """Stage B or C on a GPU, by graphs. Is called like the network, without gradients.

    Args:
        network: what is run.
        name: tells its graphs from those of other networks.
        recorder: keeps them.
    """

    def __init__(self, network: StableCascadeUNet, name: str, recorder: Recorder) -> None:
        self.network = network
        self.name = name
        self.recorder = recorder

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
        return self.recorder.run_once((self.name, "condition", latent_size), work, given)

    def __call__(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        conditions: Conditions,
        *,
        controlnet_residuals: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """See `StableCascadeUNet.forward`. The next call overwrites what this one returned."""

        def work(sample: Tensor, ratio: Tensor, conditions: Conditions, residuals: dict[int, Tensor]) -> Tensor:
            return self.network(sample, ratio, conditions, controlnet_residuals=residuals)

        residuals = dict(controlnet_residuals or {})
        return self.recorder.run((self.name, "step"), work, sample, timestep_ratio, conditions, residuals)
