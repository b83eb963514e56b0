"""Where each network lives while it is not running.

    resident    all networks stay on the GPU.
    offload     they wait in pinned memory of the host, and take turns in one arena on the GPU, as large as the largest
                of them. What has room beside the network that is running is uploaded meanwhile.
    stream      the same in a smaller arena. Of a network that exceeds it, as many blocks as fit stay there; the matrices
                of the others pass through slots, uploaded ahead of the blocks that need them.

The places in the arena are fixed, so that CUDA graphs, which read weights where they were, hold for each turn. The hooks of
accelerate and diffusers put weights into new memory each time, which graphs do not survive, and move layers that are called,
where kernels read ours without a call: hence these streams and events.
"""

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cascade.networks.unet import AttnBlock, Conditions
from cascade.packing import ALIGNMENT, Packed
from cascade.running.device import SettingError

MODES = ("auto", "resident", "offload", "stream")
GIB = 2**30
# Small, and run after or between the steps of others: they always stay on the device.
ALWAYS = ("vqgan", "previewer")
# What a picture of 1024x1024 takes beside the weights, in bytes, for each byte of a number (2 in bfloat16): Stage B's
# activations, cuBLAS's workspaces and Stage A, in tiles; more where all networks are resident, for larger pictures.
WORK = int(0.6 * GIB)
RESIDENT_WORK = int(1.0 * GIB)
# Of Stage A, in streaming.
SMALL_WORK = int(0.4 * GIB)
SLOTS = 4
# A copy that has begun holds up all others in its direction, such as the noise of the next step: 64 MiB take 1.3 ms.
PIECE = 64 * 2**20


class Choice(NamedTuple):
    """A mode other than "auto"; and, in streaming, how many bytes the arena may have. None: as few as are sensible."""

    mode: str
    room: int | None = None


def choose(mode: str, sizes: Mapping[str, int], available: int, itemsize: int) -> Choice:
    """What becomes of "auto"; other modes stay.

    Args:
        mode: one of `MODES`.
        sizes: bytes of the networks by name.
        available: bytes of the GPU that may be taken.
        itemsize: bytes of a number in the networks.

    Raises:
        SettingError: there is no such mode.
    """
    if mode not in MODES:
        raise SettingError("memory", mode, f"one of {', '.join(MODES)}")
    if mode != "auto":
        return Choice(mode)
    always = sum(size for name, size in sizes.items() if name in ALWAYS)
    largest = max(size for name, size in sizes.items() if name not in ALWAYS)
    if sum(sizes.values()) + itemsize * RESIDENT_WORK <= available:
        return Choice("resident")
    room = available - always - itemsize * WORK
    return Choice("offload") if largest <= room else Choice("stream", max(room, 0))


def available(device: torch.device) -> int:
    """Bytes of a GPU that can still be allocated: by its free memory, and by the part that this process is limited to."""
    with torch.cuda.device(device):
        free, total = torch.cuda.mem_get_info()
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):  # since torch 2.8
            limit = int(torch.cuda.get_per_process_memory_fraction() * total)
            free = min(free, limit - torch.cuda.memory_reserved())
    return max(free, 0)


def usable(device: torch.device) -> int:
    """Bytes of a GPU that tensors could take if torch's cache and all CUDA graphs were given up; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return available(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class UNet(Protocol):
    """Stage B or C, however it is run."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def condition(self, clip_text_pooled: Tensor, **given: Any) -> Conditions: ...

    def __call__(self, sample: Tensor, timestep_ratio: Tensor, conditions: Conditions, **given: Any) -> Tensor: ...


class Resident:
    """All networks stay where they are.

    Args:
        device: where that is.
    """

    mode = "resident"
    description = "all networks resident"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use(self, name: str) -> None:
        """To be called before a network runs."""

    def prefetch(self, *names: str) -> None:
        """To be called when it is known which networks will run next, in this order."""

    def idle(self) -> None:
        """To be called when the network that was used last will not run soon."""

    def streams(self, name: str) -> bool:
        """Whether a network's weights are uploaded while it runs, which no graph can replay."""
        return False

    def on_turn(self, name: str, network: UNet) -> UNet:
        """The network, used before it runs."""
        return network

    def room(self, wanted: int) -> int:
        """How many bytes a piece of work may take that would like to have so many."""
        if self.device.type != "cuda":
            return wanted
        if available(self.device) < wanted:
            torch.cuda.empty_cache()
        return min(wanted, available(self.device))


class Lane(Protocol):
    """Copies to a device, one after the other, beside the work there, which is done one after the other too."""

    def mark(self) -> Any:
        """The point at which all work launched so far is done."""

    def hold(self, mark: Any) -> None:
        """Lets the copies asked for from now on wait for a mark."""

    def upload(self, target: Tensor, source: Tensor) -> None: ...

    def uploaded(self) -> Any:
        """The point at which all copies asked for so far are done."""

    def wait(self, uploaded: Any) -> None:
        """Lets the work launched from now on wait for copies."""


class CudaLane:
    """A stream for copies; the work is on the current stream."""

    def __init__(self, arena: Tensor) -> None:
        self.device = arena.device
        self.stream = torch.cuda.Stream(self.device)
        arena.record_stream(self.stream)  # or torch would give it away, once it is dropped, before the last copy

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


class PlainLane:
    """For a device on which everything is done when it is asked for."""

    def mark(self) -> None: ...

    def hold(self, mark: None) -> None: ...

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def uploaded(self) -> None: ...

    def wait(self, uploaded: None) -> None: ...


class Ring:
    """Slots through which the matrices of a network's blocks pass, each block always through the same one.

    Args:
        lane: by which they come.
        sources: the blocks' bytes on the host.
        slots: their places in the arena; block i passes through slot i modulo their number.
        condition, forward: the blocks in the order in which the network's `condition`, then each forward runs them.
    """

    def __init__(
        self,
        lane: Lane,
        sources: Sequence[Tensor],
        slots: Sequence[Tensor],
        condition: Sequence[int],
        forward: Sequence[int],
    ) -> None:
        self.lane, self.sources, self.slots = lane, sources, slots
        self.orders = {"condition": list(condition), "forward": list(forward)}
        self.position = -1
        self.clear()

    def clear(self) -> None:
        """The slots have been used for something else."""
        self.holds: list[int | None] = [None] * len(self.slots)
        self.uploaded: list[Any] = [None] * len(self.slots)

    def start(self) -> None:
        """The network will run."""
        self._ahead([*self.orders["condition"], *self.orders["forward"]])

    def before(self, block: int) -> None:
        """A block is about to run."""
        slot = block % len(self.slots)
        if self.holds[slot] != block:
            self._upload(block)
        self.lane.wait(self.uploaded[slot])

    def after(self, what: str, block: int) -> None:
        """A block has been launched, as part of "condition" or "forward": its slot is for whichever comes next."""
        order = self.orders[what]
        following = (*range(self.position + 1, len(order)), *range(min(self.position + 1, len(order))))
        self.position = next(position for position in following if order[position] == block)
        self._ahead([*order[self.position + 1 :], *self.orders["forward"]])

    def _ahead(self, blocks: Sequence[int]) -> None:
        """Upload what comes next, up to the first block whose slot is needed by another before."""
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
        # What was launched last is, as a rule, the slot's last block.
        self.lane.hold(self.lane.mark())
        self.lane.upload(self.slots[slot][: len(source)], source)
        self.holds[slot], self.uploaded[slot] = block, self.lane.uploaded()


class Piece(NamedTuple):
    """Bytes of the arena, and those of the host that belong there."""

    start: int
    stop: int
    source: Tensor


@dataclass(eq=False)
class Turn:
    """A network's part in the arena.

    Attributes:
        start, stop: the bytes that it takes there.
        pieces: what is uploaded before it runs. The rest are slots.
        ring: what brings the other blocks while it runs, if not all fit.
        ready: the point at which its last piece is uploaded.
    """

    packed: Packed
    start: int
    stop: int
    pieces: list[Piece]
    ring: Ring | None = None
    ready: Any = None


class Arena(Resident):
    """Networks take turns in one memory of the device.

    The rule that keeps copies off memory that is still read: while a network runs, only its own part is read; and every
    copy waits for all work that was launched before the last call of `use` or `idle`.

    Args:
        networks: by name, packed. They lie on `device` from now on, in the arena.
        device: where they run.
        choice: "offload", or "stream" and how large the arena may be.
        lane: makes of the arena how copies come there.
    """

    def __init__(
        self,
        networks: Mapping[str, Packed],
        device: torch.device,
        choice: Choice,
        lane: Callable[[Tensor], Lane] | None = None,
    ) -> None:
        super().__init__(device)
        self.mode = choice.mode
        size = arena_size(networks, choice)
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        if lane is not None:
            self.lane = lane(self.memory)
        else:
            self.lane = CudaLane(self.memory) if device.type == "cuda" else PlainLane()
        self.turns: dict[str, Turn] = {}
        end = size
        for name, packed in networks.items():
            # The UNets begin at the start; the others lie one before the other at the end, where they can often stay, or
            # come while a UNet runs.
            start = 0
            if not packed.blocks:
                end = (end if packed.size <= end else size) - packed.size
                start = end
            self.turns[name] = self._place(packed, start)
        edges = {0, size}
        for turn in self.turns.values():
            edges |= {turn.start, turn.stop, *(edge for piece in turn.pieces for edge in piece[:2])}
        # Whose bytes lie between an edge and the next.
        self.owners: dict[tuple[int, int], str | None] = dict.fromkeys(pairwise(sorted(edges)))
        self.running: str | None = None

    @property
    def description(self) -> str:
        uploaded = [name for name in self.turns if self.streams(name)]
        how = f", {' and '.join(uploaded)} block by block" if uploaded else ""
        return f"networks taking turns in {len(self.memory) / GIB:.2f} GiB ({self.mode}{how})"

    def use(self, name: str) -> None:
        if name == self.running or name not in self.turns:
            return
        self.prefetch(name)
        self.idle()
        self.running = name
        turn = self.turns[name]
        inside = self._inside(turn.start, turn.stop)
        if turn.ring is not None and any(self.owners[part] != name for part in inside):
            turn.ring.clear()
        self._bring(name, inside)
        if turn.ready is not None:
            self.lane.wait(turn.ready)
        if turn.ring is not None:
            turn.ring.start()

    def prefetch(self, *names: str) -> None:
        taken = [self.turns[self.running]] if self.running is not None else []
        for name in names:
            turn = self.turns[name]
            # Not into slots: what they hold is known while the network runs.
            parts = self._inside(turn.start, turn.pieces[-1].stop)
            free = [
                (start, stop) for start, stop in parts if all(stop <= one.start or one.stop <= start for one in taken)
            ]
            self._bring(name, free)
            taken.append(turn)

    def idle(self) -> None:
        self.lane.hold(self.lane.mark())
        self.running = None

    def streams(self, name: str) -> bool:
        return self.turns[name].ring is not None

    def on_turn(self, name: str, network: UNet) -> UNet:
        return OnTurn(network, self, name)

    def room(self, wanted: int) -> int:
        return super().room(wanted if self.mode == "offload" else min(wanted, SMALL_WORK))

    def _place(self, packed: Packed, start: int) -> Turn:
        if packed.size <= len(self.memory):
            for group, (first, last) in enumerate(pairwise(packed.bounds)):
                packed.move(group, self.memory[start + first : start + last])
            stop = start + packed.size
            return Turn(packed, start, stop, [Piece(start, stop, packed.host[: packed.size])])

        staying, slots = divide(packed, len(self.memory))
        pieces, end = [], start
        for group in [0, *(block + 1 for block in sorted(staying))]:
            source = packed.bytes_of(group)
            pieces.append(Piece(end, end + len(source), source))
            packed.move(group, self.memory[end : end + len(source)])
            end += len(source)
        places = []
        for size in slots:
            places.append(self.memory[end : end + size])
            end += size
        passing = [block for block in range(len(packed.blocks)) if block not in staying]
        for i, block in enumerate(passing):
            packed.move(block + 1, places[i % len(places)])
        ring = self._ring(packed, passing, places)
        return Turn(packed, start, end, pieces, ring)

    def _ring(self, packed: Packed, passing: Sequence[int], slots: Sequence[Tensor]) -> Ring:
        blocks = [packed.blocks[block] for block in passing]
        numbers = {id(block): i for i, block in enumerate(blocks)}
        forward = [numbers[id(block)] for block in packed.network.executed() if id(block) in numbers]
        condition = [i for i, block in enumerate(blocks) if isinstance(block, AttnBlock)]
        ring = Ring(self.lane, [packed.bytes_of(block + 1) for block in passing], slots, condition, forward)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: ring.before(i))
            block.register_forward_hook(lambda *_, i=i: ring.after("forward", i))
            if isinstance(block, AttnBlock):
                block.condition.register_forward_pre_hook(lambda *_, i=i: ring.before(i))
                block.condition.register_forward_hook(lambda *_, i=i: ring.after("condition", i))
        return ring

    def _inside(self, start: int, stop: int) -> list[tuple[int, int]]:
        return [part for part in self.owners if start <= part[0] and part[1] <= stop]

    def _bring(self, name: str, parts: Sequence[tuple[int, int]]) -> None:
        """Upload what does not lie there yet."""
        turn = self.turns[name]
        missing = [part for part in parts if self.owners[part] != name]
        for start, stop in missing:
            self.owners[start, stop] = name
            piece = turn.pieces[bisect(turn.pieces, start, key=lambda one: one.start) - 1]
            if start < piece.stop:  # no slot
                self.lane.upload(self.memory[start:stop], piece.source[start - piece.start : stop - piece.start])
        if missing:
            turn.ready = self.lane.uploaded()


def arena_size(networks: Mapping[str, Packed], choice: Choice) -> int:
    """Bytes: of the largest network; in streaming as many as it may be, or those of the largest network but one. In any
    case what has to be there at once of each."""
    sizes = sorted(packed.size for packed in networks.values())
    if choice.mode == "offload":
        return sizes[-1]
    room = sizes[-2] if choice.room is None else choice.room // ALIGNMENT * ALIGNMENT
    return max(min(room, sizes[-1]), *(least(packed) for packed in networks.values()))


def least(packed: Packed) -> int:
    """Bytes of a network that have to be there at once: all, or without its blocks but for those in the slots."""
    if not packed.blocks:
        return packed.size
    first, *sizes = _sizes(packed)
    return first + sum(_slots(sizes))


def divide(packed: Packed, room: int) -> tuple[set[int], list[int]]:
    """Which blocks of a network stay, so that with the slots for the others it takes no more than `room` bytes.

    Those that stay are spread evenly: the copies go on while they run.

    Args:
        packed: has blocks, and more bytes than `room`.
        room: as many as are needed at once, or more.

    Returns:
        The numbers of the blocks that stay, and the sizes of the slots.
    """
    first, *sizes = _sizes(packed)
    for number in range(len(sizes) - 1, -1, -1):
        staying = {i for i in range(len(sizes)) if i * number // len(sizes) != (i + 1) * number // len(sizes)}
        slots = _slots([size for i, size in enumerate(sizes) if i not in staying])
        if first + sum(sizes[i] for i in staying) + sum(slots) <= room:
            break
    return staying, slots


def _sizes(packed: Packed) -> list[int]:
    return [last - start for start, last in pairwise(packed.bounds)]


def _slots(passing: Sequence[int]) -> list[int]:
    """The sizes of the slots for blocks of these sizes."""
    return [max(passing[i::SLOTS]) for i in range(min(SLOTS, len(passing)))]


class OnTurn:
    """A UNet that takes its turn in an arena whenever it is called."""

    def __init__(self, network: UNet, arena: Arena, name: str) -> None:
        self.network, self.arena, self.name = network, arena, name

    @property
    def config(self) -> Mapping[str, Any]:
        return self.network.config

    def condition(self, clip_text_pooled: Tensor, **given: Any) -> Conditions:
        self.arena.use(self.name)
        return self.network.condition(clip_text_pooled, **given)

    def __call__(self, sample: Tensor, timestep_ratio: Tensor, conditions: Conditions, **given: Any) -> Tensor:
        self.arena.use(self.name)
        return self.network(sample, timestep_ratio, conditions, **given)
