"""Keeps networks' weights on the GPU, or uploads them in turn into one cache there.

Every network has fixed addresses in the cache. CUDA graphs read weights at the addresses where they were captured, so they
stay valid. accelerate's and diffusers' offload hooks allocate new memory on every upload, which invalidates graphs, and they
hook `forward`, which fused functions bypass. So this module manages copies itself.
"""

import contextlib
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cascade.networks.protocol import UNet
from cascade.networks.unet import AttnBlock, Conditions
from cascade.running.packing import ALIGNMENT, HostWeights
from cascade.running.placement import GIB, SMALL_WORK, MemoryMode, available
from cascade.running.streaming import BlockStream, CudaUploader, DirectUploader, Uploader, divide, least


class ResidentWeights:
    """All networks stay on the device. Also the interface of `WeightCache`."""

    mode = "resident"
    description = "all networks resident"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use(self, name: str) -> None:
        """Make a network's weights available. Call it before the network runs."""

    def prefetch(self, *names: str) -> None:
        """Upload weights that do not overlap the running network's. `names`: the next networks, in their order."""

    def release(self) -> None:
        """Allow uploads to overwrite the weights of the network used last."""

    def streams(self, name: str) -> bool:
        """Whether a network's blocks are uploaded while it runs. CUDA graphs can't replay that."""
        return False

    def wrap(self, name: str, network: UNet) -> UNet:
        """A UNet that calls `use` before it runs."""
        return network

    @contextlib.contextmanager
    def editing(self, name: str, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """A context for changing a network's weights in place, which kernels and graphs read at their addresses.

        Yields:
            The tensors to write to, by the names of the network's parameters. They may be on the host.
        """
        yield {key: parameter.data for key, parameter in network.named_parameters()}

    def workspace(self, wanted: int) -> int:
        """How many of the `wanted` bytes are available for temporary work."""
        if self.device.type != "cuda":
            return wanted
        if available(self.device) < wanted:
            torch.cuda.empty_cache()
        return min(wanted, available(self.device))


class Segment(NamedTuple):
    """Bytes `start` to `stop` of the cache, and the host bytes that are uploaded there."""

    start: int
    stop: int
    source: Tensor


@dataclass(eq=False)
class Region:
    """A network's part of the cache.

    Attributes:
        weights: the network's weights on the host.
        start, stop: bytes of the cache.
        segments: the parts that are uploaded before the network runs. The rest of the region holds slots.
        stream: uploads the other blocks into the slots while the network runs; None: the whole network fits.
        ready: the event of the last segment's upload, see `Uploader.uploaded`.
    """

    weights: HostWeights
    start: int
    stop: int
    segments: list[Segment]
    stream: BlockStream | None = None
    ready: Any = None


class WeightCache(ResidentWeights):
    """Networks share one buffer on the device, each at fixed addresses.

    Invariant: while a network runs, only its own region is read, and every copy waits for all work launched before the last
    `use` or `release`. So no copy overwrites memory in use.

    Args:
        networks: by name. Their tensors become views of the cache.
        device: the device they run on.
        mode: "offload", or "stream" and the cache's size in bytes.
        uploader: makes an uploader for the cache; None: the default of the device.
    """

    def __init__(
        self,
        networks: Mapping[str, HostWeights],
        device: torch.device,
        mode: MemoryMode,
        uploader: Callable[[Tensor], Uploader] | None = None,
    ) -> None:
        super().__init__(device)
        self.mode = mode.name
        size = cache_size(networks, mode)
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        if uploader is None:
            uploader = CudaUploader if device.type == "cuda" else lambda _: DirectUploader()
        self.uploader = uploader(self.memory)
        self.regions: dict[str, Region] = {}
        end = size
        for name, weights in networks.items():
            # UNets start at 0. The other networks are put side by side at the end, where UNets often do not reach: so they
            # stay there, or are uploaded while a UNet runs.
            start = 0
            if not weights.blocks:
                end = (end if weights.size <= end else size) - weights.size
                start = end
            self.regions[name] = self._place(weights, start)
        edges = {0, size}
        for region in self.regions.values():
            edges |= {region.start, region.stop, *(edge for segment in region.segments for edge in segment[:2])}
        # The network whose bytes are between two neighbouring edges.
        self.owners: dict[tuple[int, int], str | None] = dict.fromkeys(pairwise(sorted(edges)))
        self.running: str | None = None

    @property
    def description(self) -> str:
        uploaded = [name for name in self.regions if self.streams(name)]
        how = f", {' and '.join(uploaded)} block by block" if uploaded else ""
        return f"networks uploaded in turn into {len(self.memory) / GIB:.2f} GiB ({self.mode}{how})"

    def use(self, name: str) -> None:
        if name == self.running or name not in self.regions:
            return
        self.prefetch(name)
        self.release()
        self.running = name
        region = self.regions[name]
        inside = self._inside(region.start, region.stop)
        if region.stream is not None and any(self.owners[part] != name for part in inside):
            region.stream.clear()
        self._upload(name, inside)
        if region.ready is not None:
            self.uploader.wait(region.ready)
        if region.stream is not None:
            region.stream.start()

    def prefetch(self, *names: str) -> None:
        taken = [self.regions[self.running]] if self.running is not None else []
        for name in names:
            region = self.regions[name]
            # Skips the slots: the BlockStream tracks their content while the network runs.
            parts = self._inside(region.start, region.segments[-1].stop)
            free = [
                (start, stop) for start, stop in parts if all(stop <= one.start or one.stop <= start for one in taken)
            ]
            self._upload(name, free)
            taken.append(region)

    def release(self) -> None:
        self.uploader.hold(self.uploader.mark())
        self.running = None

    def streams(self, name: str) -> bool:
        return self.regions[name].stream is not None

    def wrap(self, name: str, network: UNet) -> UNet:
        return CachedUNet(network, self, name)

    @contextlib.contextmanager
    def editing(self, name: str, network: nn.Module) -> Iterator[dict[str, Tensor]]:
        """See `ResidentWeights`. The host's bytes are written to, and uploaded again before the network runs."""
        if name not in self.regions:
            with super().editing(name, network) as tensors:
                yield tensors
            return
        region = self.regions[name]
        self.uploader.finish()
        try:
            yield region.weights.tensors()
        finally:
            if self.device.type == "cuda":  # copies from there to the host
                torch.cuda.current_stream(self.device).synchronize()
            for part in self._inside(region.start, region.stop):
                if self.owners[part] == name:
                    self.owners[part] = None
            if region.stream is not None:
                region.stream.clear()
            self.release()

    def workspace(self, wanted: int) -> int:
        return super().workspace(wanted if self.mode == "offload" else min(wanted, SMALL_WORK))

    def _place(self, weights: HostWeights, start: int) -> Region:
        if weights.size <= len(self.memory):
            for group, (first, last) in enumerate(pairwise(weights.bounds)):
                weights.move(group, self.memory[start + first : start + last])
            stop = start + weights.size
            return Region(weights, start, stop, [Segment(start, stop, weights.host[: weights.size])])

        staying, slots = divide(weights, len(self.memory))
        segments, end = [], start
        for group in [0, *(block + 1 for block in sorted(staying))]:
            source = weights.bytes_of(group)
            segments.append(Segment(end, end + len(source), source))
            weights.move(group, self.memory[end : end + len(source)])
            end += len(source)
        places = []
        for size in slots:
            places.append(self.memory[end : end + size])
            end += size
        passing = [block for block in range(len(weights.blocks)) if block not in staying]
        for i, block in enumerate(passing):
            weights.move(block + 1, places[i % len(places)])
        stream = self._block_stream(weights, passing, places)
        return Region(weights, start, end, segments, stream)

    def _block_stream(self, weights: HostWeights, passing: Sequence[int], slots: Sequence[Tensor]) -> BlockStream:
        blocks = [weights.blocks[block] for block in passing]
        numbers = {id(block): i for i, block in enumerate(blocks)}
        forward = [numbers[id(block)] for block in weights.network.executed() if id(block) in numbers]
        condition = [i for i, block in enumerate(blocks) if isinstance(block, AttnBlock)]
        stream = BlockStream(
            self.uploader, [weights.bytes_of(block + 1) for block in passing], slots, condition, forward
        )
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: stream.before(i))
            block.register_forward_hook(lambda *_, i=i: stream.after("forward", i))
            if isinstance(block, AttnBlock):
                block.condition.register_forward_pre_hook(lambda *_, i=i: stream.before(i))
                block.condition.register_forward_hook(lambda *_, i=i: stream.after("condition", i))
        return stream

    def _inside(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [part for part in self.owners if start <= part[0] and part[1] <= stop]

    def _upload(self, name: str, parts: Sequence[tuple[int, int]]) -> None:
        """Upload those parts of the cache that do not hold the network's bytes yet."""
        region = self.regions[name]
        missing = [part for part in parts if self.owners[part] != name]
        for start, stop in missing:
            self.owners[start, stop] = name
            segment = region.segments[bisect(region.segments, start, key=lambda one: one.start) - 1]
            if start < segment.stop:  # not a slot
                self.uploader.upload(
                    self.memory[start:stop], segment.source[start - segment.start : stop - segment.start]
                )
        if missing:
            region.ready = self.uploader.uploaded()


def cache_size(networks: Mapping[str, HostWeights], mode: MemoryMode) -> int:
    """Bytes of the cache.

    In "offload", the size of the largest network. In "stream", `mode.size`, or the size of the second largest network; at
    most the largest network, and at least each network's minimum (`streaming.least`).
    """
    sizes = sorted(weights.size for weights in networks.values())
    if mode.name == "offload":
        return sizes[-1]
    size = sizes[-2] if mode.size is None else mode.size // ALIGNMENT * ALIGNMENT
    return max(min(size, sizes[-1]), *(least(weights) for weights in networks.values()))


class CachedUNet:
    """A UNet that uploads its weights into a cache before it runs."""

    def __init__(self, network: UNet, cache: WeightCache, name: str) -> None:
        self.network, self.cache, self.name = network, cache, name

    @property
    def config(self) -> Mapping[str, Any]:
        return self.network.config

    def condition(self, clip_text_pooled: Tensor, **given: Any) -> Conditions:
        self.cache.use(self.name)
        return self.network.condition(clip_text_pooled, **given)

    def __call__(self, sample: Tensor, timestep_ratio: Tensor, conditions: Conditions, **given: Any) -> Tensor:
        self.cache.use(self.name)
        return self.network(sample, timestep_ratio, conditions, **given)
