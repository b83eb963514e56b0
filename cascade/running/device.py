"""Chooses the device and the dtype of the networks."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from cascade.kernels import CAPABILITY as KERNELS_FROM

T = TypeVar("T")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# CUDA compute capability, like `KERNELS_FROM`. GPUs below `KERNELS_FROM` emulate bfloat16. Below 7.0, float16 is hardly
# faster than float32 (6.0) or much slower (6.1).
FLOAT16_FROM = (7, 0)


# How weights are kept: "auto", as the model folder has them; "full", in the networks' dtype; "int8", in 8 bits; "fp8", in 8 bits,
# with products in 8 bits.
PRECISIONS = ("auto", "full", "int8", "fp8")
# What the precision of a loaded model adds to the name of its dtype, for people.
ADDS = {"full": "", "int8": " with weights in 8 bits", "fp8": " with products in 8 bits"}


class SettingError(ValueError):
    """A setting has a value that is not allowed.

    Attributes:
        name: the setting.
        problem: the error message without the name.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name = name
        self.problem = f"is {str(value)!r}; it must be {allowed}."
        super().__init__(f"{name} {self.problem}")


@dataclass(frozen=True)
class Machine:
    """The devices of a machine.

    Attributes:
        capabilities: the compute capability of each CUDA device.
        current: the index of the current CUDA device.
        mps: whether Apple's Metal is available.
    """

    capabilities: tuple[tuple[int, int], ...] = ()
    current: int = 0
    mps: bool = False

    @classmethod
    def this(cls) -> "Machine":
        """The machine that runs this program."""
        mps = torch.backends.mps.is_available()
        if not torch.cuda.is_available():
            return cls(mps=mps)
        capabilities = tuple(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        return cls(capabilities, torch.cuda.current_device(), mps)


class Placement(NamedTuple):
    """The networks' device and dtype, and the reason for them: two clauses, for the log."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_device(
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    machine: Machine | None = None,
) -> Placement:
    """Choose the device and the dtype, as far as the caller does not.

    Args:
        device: "cpu", "mps", "cuda", or "cuda:N"; "auto" or None: a CUDA device if there is one, else Metal, else the CPU.
        dtype: "bfloat16", "float16" or "float32"; "auto" or None: on CUDA bfloat16 from compute capability 8.0, float16
            from 7.0, else float32; on Metal float16; on a CPU float32.
        machine: the machine's devices; None: this machine.

    Raises:
        SettingError: there is no such device or dtype.
    """
    machine = machine or Machine.this()
    place, why_there = _choose_place(str(device or "auto"), machine)
    named = str(dtype or "auto").removeprefix("torch.")
    if named not in ("auto", *DTYPES):
        raise SettingError("dtype", named, f"one of auto, {', '.join(DTYPES)}")
    chosen, why_so = _choose_dtype(place, machine)
    if named != "auto":
        chosen, why_so = named, f"{named} was asked for"
        if place.type == "cuda" and machine.capabilities[place.index] < KERNELS_FROM:
            why_so += ", and its kernels are plain torch's"
    return Placement(place, DTYPES[chosen], f"{why_there}, and {why_so}")


def check_precision(precision: str) -> None:
    """Raise a SettingError if there is no such precision, see `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise SettingError("precision", precision, f"one of {', '.join(PRECISIONS)}")


def _choose_place(wanted: str, machine: Machine) -> tuple[torch.device, str]:
    count = len(machine.capabilities)
    cuda = {f"cuda:{index}": index for index in range(count)}
    if count:
        cuda = {"cuda": machine.current, **cuda}
    there = ["auto", "cpu", *cuda, *(["mps"] if machine.mps else [])]
    if wanted not in there:
        raise SettingError("device", wanted, f"one of {', '.join(there)} on this machine")
    if wanted in cuda:
        return torch.device("cuda", cuda[wanted]), f"{wanted} was asked for"
    if wanted != "auto":
        return torch.device(wanted), f"{wanted} was asked for"
    if count:
        return torch.device("cuda", machine.current), "there is a CUDA device"
    if machine.mps:
        return torch.device("mps"), "there is Metal and no CUDA device"
    return torch.device("cpu"), "there is no CUDA device"


def _choose_dtype(device: torch.device, machine: Machine) -> tuple[str, str]:
    if device.type == "cpu":
        return "float32", "float32 is what a CPU computes in"
    if device.type == "mps":
        return "float16", "Metal has float16 in every version"
    capability = machine.capabilities[device.index]
    number = "{}.{}".format(*capability)
    if capability >= KERNELS_FROM:
        return "bfloat16", f"compute capability {number} has bfloat16 and runs the Triton kernels"
    if capability >= FLOAT16_FROM:
        return "float16", f"compute capability {number} has float16, no bfloat16 and no Triton kernels"
    return "float32", f"compute capability {number} has neither bfloat16, fast float16 nor Triton kernels"


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is the current one. Triton launches kernels there, and streams and graphs are made there."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def within(context: Callable[[], AbstractContextManager[object]], work: Generator[T, None, None]) -> Iterator[T]:
    """Iterate over a generator. Each of its steps runs in a context, and the caller's code outside of it.

    A `with` around the `yield` of a generator would stay open in the caller until the next step.
    """
    try:
        while True:
            with context():
                try:
                    item = next(work)
                except StopIteration:
                    return
            yield item
    finally:
        with context():
            work.close()
