"""CUDA graphs: what a network has once done for inputs of some shapes is done again without Python.

A step of Stage C launches some 600 kernels. Launched one by one they take 34 ms on an H100, by a graph 17.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cascade.networks.unet import Conditions, StableCascadeUNet

# How many shapes are remembered for each network; the one that was used least recently makes room.
MOST = 8


@cache
def _warm_up_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps 32 MiB of workspace for each stream that it has seen (H100)."""
    return torch.cuda.Stream(device)


def _pool(device: torch.device) -> tuple[int, int]:
    """One memory for the intermediate results of all graphs of a device: they are replayed one after the other.

    When no graph is left, torch has given it away; the next one gets another.
    """
    for recording in _recordings:
        if recording.device == device:
            return recording.pool
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


class _Recording:
    """One graph, with its inputs and outputs at their fixed places."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...]) -> None:
        self.device = device = inputs[0].device
        self.pool = _pool(device)
        self.inputs = tuple(tensor.clone() for tensor in inputs)
        self.given = [weakref.ref(tensor) for tensor in inputs]
        # Outside of a graph first: what is done only once, like compiling kernels, must not be recorded.
        stream = _warm_up_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)
        _recordings.add(self)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = [i for i, tensor in enumerate(inputs) if self.given[i]() is not tensor]
        if changed:
            torch._foreach_copy_([self.inputs[i] for i in changed], [inputs[i] for i in changed])
            for i in changed:
                self.given[i] = weakref.ref(inputs[i])
        self.graph.replay()
        return self.outputs


_recordings: "weakref.WeakSet[_Recording]" = weakref.WeakSet()


class Recorder:
    """Runs functions of tensors, and remembers them as graphs by a key and the tensors' shapes.

    The functions wait for nothing, and what they read besides their tensors stays where it is. The tensors that are given
    are not changed in place between calls. All calls come from one stream.

    Attributes:
        records: whether it does so. A graph keeps the memory of all that it computes; when there is not enough, functions
            can be run without.
    """

    def __init__(self) -> None:
        self.recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self.records = True

    @torch.no_grad()
    def run(self, key: Hashable, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """What `function(*tensors)` returns. The next call with this key and these shapes overwrites it."""
        if not self.records or tensors[0].device.type != "cuda":
            return function(*tensors)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        recording = self.recordings.get((key, shapes))
        if recording is None:
            while len(self.recordings) >= MOST:
                self.recordings.popitem(last=False)
            recording = self.recordings[key, shapes] = _Recording(function, tensors)
        self.recordings.move_to_end((key, shapes))
        return recording.replay(tensors)

    def run_once(self, key: Hashable, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> list[Tensor]:
        """As `run`, but what is returned stays: for what is not a step of many."""
        return [tensor.clone() for tensor in self.run(key, function, *tensors)]

    def clear(self) -> None:
        """Forget all graphs: for when a network has moved, or their memory is needed."""
        self.recordings.clear()


class GraphedUNet:
    """Stage B or C on a GPU, by graphs. Is called like the network, without gradients."""

    def __init__(self, network: StableCascadeUNet) -> None:
        self.network = network
        self.recorder = Recorder()

    @property
    def config(self) -> Mapping[str, Any]:
        return self.network.config

    def condition(
        self, clip_text_pooled: Tensor, *, latent_size: tuple[int, int] | None = None, **given: Tensor | None
    ) -> Conditions:
        """See `StableCascadeUNet.condition`."""
        given = {"clip_text_pooled": clip_text_pooled, **{name: x for name, x in given.items() if x is not None}}

        def work(*tensors: Tensor) -> tuple[Tensor, ...]:
            made = self.network.condition(**dict(zip(given, tensors, strict=True)), latent_size=latent_size)
            return _flat(made)

        return _unflat(self.recorder.run_once(("condition", tuple(given), latent_size), work, *given.values()))

    def __call__(
        self,
        sample: Tensor,
        timestep_ratio: Tensor,
        conditions: Conditions,
        *,
        controlnet_residuals: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """See `StableCascadeUNet.forward`. The next call overwrites what this one returned."""
        residuals = controlnet_residuals or {}
        flat = _flat(conditions)

        def work(sample: Tensor, ratio: Tensor, *rest: Tensor) -> tuple[Tensor]:
            added = dict(zip(residuals, rest[len(flat) :], strict=True))
            return (self.network(sample, ratio, _unflat(rest[: len(flat)]), controlnet_residuals=added),)

        key = ("step", len(flat), tuple(residuals))
        return self.recorder.run(key, work, sample, timestep_ratio, *flat, *residuals.values())[0]


def graphed(network: StableCascadeUNet) -> "StableCascadeUNet | GraphedUNet":
    """The network by graphs if it lies on a GPU, else as it is."""
    return GraphedUNet(network) if network.device.type == "cuda" else network


def _flat(conditions: Conditions) -> tuple[Tensor, ...]:
    last = () if conditions.feature_map is None else (conditions.feature_map,)
    return (*conditions.keys, *conditions.values, *last)


def _unflat(tensors: "list[Tensor] | tuple[Tensor, ...]") -> Conditions:
    blocks = len(tensors) // 2
    feature_map = tensors[-1] if len(tensors) % 2 else None
    return Conditions(tuple(tensors[:blocks]), tuple(tensors[blocks : 2 * blocks]), feature_map)
