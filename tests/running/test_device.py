"""The choice of device and dtype for described machines, and the current device between steps."""

import contextlib
from collections.abc import Generator, Iterator

import pytest
import torch

from cascade.pipeline import Cascade
from cascade.running.device import Machine, SettingError, choose_device, within

H100, A100, RTX_2080, P100, GTX_1080 = (9, 0), (8, 0), (7, 5), (6, 0), (6, 1)


@pytest.mark.parametrize(
    ("machine", "device", "dtype", "reason"),
    [
        (Machine((H100,)), "cuda:0", torch.bfloat16, "compute capability 9.0 has bfloat16 and runs the Triton kernels"),
        (Machine((A100, RTX_2080)), "cuda:0", torch.bfloat16, "compute capability 8.0 has bfloat16"),
        (Machine((A100, RTX_2080), current=1), "cuda:1", torch.float16, "7.5 has float16, no bfloat16 and no Triton"),
        (Machine((P100,)), "cuda:0", torch.float32, "6.0 has neither bfloat16, fast float16 nor Triton kernels"),
        (Machine((GTX_1080,), mps=True), "cuda:0", torch.float32, "there is a CUDA device"),
        (Machine(mps=True), "mps", torch.float16, "there is Metal and no CUDA device"),
        (Machine(), "cpu", torch.float32, "there is no CUDA device, and float32 is what a CPU computes in"),
    ],
)
@pytest.mark.parametrize("left_open", [None, "auto"])
def test_what_is_left_open_suits_the_machine(
    machine: Machine, device: str, dtype: torch.dtype, reason: str, left_open: str | None
) -> None:
    chosen = choose_device(left_open, left_open, machine)
    assert (str(chosen.device), chosen.dtype) == (device, dtype)
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", None, ("cuda:1", torch.float16)),
        ("cuda:0", None, ("cuda:0", torch.bfloat16)),
        (torch.device("cuda", 0), torch.float32, ("cuda:0", torch.float32)),
        ("cuda:1", "bfloat16", ("cuda:1", torch.bfloat16)),
        ("cpu", None, ("cpu", torch.float32)),
        ("cpu", "bfloat16", ("cpu", torch.bfloat16)),
        ("auto", "float16", ("cuda:1", torch.float16)),
    ],
)
def test_what_is_asked_for_is_taken(
    device: str | torch.device, dtype: str | torch.dtype | None, expected: tuple[str, torch.dtype]
) -> None:
    chosen = choose_device(device, dtype, Machine((A100, RTX_2080), current=1))
    assert (str(chosen.device), chosen.dtype) == expected
    assert "asked for" in chosen.reason


@pytest.mark.parametrize(
    ("device", "dtype", "machine", "sentence"),
    [
        ("gpu", None, Machine(), "device is 'gpu'; it must be one of auto, cpu on this machine."),
        ("cuda", None, Machine(mps=True), "device is 'cuda'; it must be one of auto, cpu, mps on this machine."),
        (
            "cuda:2",
            None,
            Machine((H100, H100)),
            "device is 'cuda:2'; it must be one of auto, cpu, cuda, cuda:0, cuda:1 on this machine.",
        ),
        (None, "fp16", Machine(), "dtype is 'fp16'; it must be one of auto, bfloat16, float16, float32."),
        (None, torch.int8, Machine(), "dtype is 'int8'; it must be one of auto, bfloat16, float16, float32."),
    ],
)
def test_what_there_is_not_is_refused(
    device: str | None, dtype: str | torch.dtype | None, machine: Machine, sentence: str
) -> None:
    with pytest.raises(SettingError) as caught:
        choose_device(device, dtype, machine)
    assert str(caught.value) == sentence


def test_the_machine_that_runs_this() -> None:
    machine = Machine.this()
    assert len(machine.capabilities) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_loading_says_where_and_why(model_folder: object, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Cascade.load(model_folder, "cpu", "float16")
    assert "Device: cpu in float16; cpu was asked for, and float16 was asked for." in caplog.text
    with pytest.raises(SettingError, match=r"^device is 'tpu'; it must be one of auto, cpu"):
        Cascade.load(model_folder, "tpu")


def test_each_step_is_taken_in_the_context_and_none_of_the_callers_work() -> None:
    inside = 0
    seen: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        nonlocal inside
        inside += 1
        try:
            yield
        finally:
            inside -= 1

    def work() -> Generator[int, None, None]:
        try:
            for step in range(3):
                seen.append(("step", inside))
                yield step
        finally:
            seen.append(("end", inside))

    assert [(step, inside) for step in within(context, work())] == [(0, 0), (1, 0), (2, 0)]
    assert seen == [*[("step", 1)] * 3, ("end", 1)]
    seen.clear()
    stopped = within(context, work())
    next(stopped)
    stopped.close()
    assert seen == [("step", 1), ("end", 1)]
    assert inside == 0
