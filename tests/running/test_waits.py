"""Waits for a whole GPU against captures in other threads. Threads and locks are real; what would wait, only counts."""

import gc
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.running import packing, waits
from cascade.running.errors import is_lost
from cascade.running.graphs import CapturedGraph
from cascade.running.packing import HostWeights
from cascade.running.waits import OneAtATime, one_at_a_time

ENOUGH = 10.0


@contextmanager
def capturing(context: OneAtATime) -> Iterator[None]:
    """Another thread captures while the block runs."""
    began, ends = threading.Event(), threading.Event()

    def capture() -> None:
        with context:
            began.set()
            assert ends.wait(ENOUGH)

    thread = threading.Thread(target=capture)
    thread.start()
    assert began.wait(ENOUGH)
    try:
        yield
    finally:
        ends.set()
        thread.join(ENOUGH)
    assert not thread.is_alive()


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that waited for a whole device, instead of which there is none."""
    threads: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: threads.append(threading.current_thread().name))
    return threads


def test_the_check_for_a_lost_gpu_waits_for_a_capture(waited: list[str]) -> None:
    check = threading.Thread(target=is_lost, args=(torch.device("cuda"),))
    with capturing(one_at_a_time):
        check.start()
        check.join(0.2)
        assert check.is_alive()
        assert waited == []
    check.join(ENOUGH)
    assert not check.is_alive()
    assert waited


def test_a_thread_whose_capture_failed_can_look_after_the_gpu(waited: list[str]) -> None:
    with one_at_a_time:
        is_lost(torch.device("cuda"))
    assert waited


@pytest.fixture
def unpinned(waited: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that waited in order to unpin; memory is neither pinned nor unpinned."""
    monkeypatch.setattr(packing, "_pin", lambda memory: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Unpinning)
    return waited


class Unpinning:
    """CUDA's runtime, as far as unpinning uses it."""

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return 0


def test_weights_are_unpinned_after_a_capture(unpinned: list[str]) -> None:
    """Freeing them does not wait for it: a finalizer may run while its thread holds locks that the capture needs."""
    weights = HostWeights(nn.Linear(2, 2), pin=True)
    freed = weakref.ref(weights)
    with capturing(one_at_a_time):
        del weights
        gc.collect()
        assert freed() is None
        assert unpinned == []
    assert len(unpinned) == 1

    del_without_capture = HostWeights(nn.Linear(2, 2), pin=True)
    del del_without_capture
    gc.collect()
    assert len(unpinned) == 2


def test_weights_freed_by_a_captured_function_are_unpinned_after_it(
    unpinned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [HostWeights(nn.Linear(2, 2), pin=True)]

    def capture(self: CapturedGraph, *given: object) -> None:
        held.clear()
        assert unpinned == []

    monkeypatch.setattr(CapturedGraph, "_capture", capture)
    CapturedGraph(Tensor.clone, [torch.ones(1)], (0, 1))
    assert len(unpinned) == 1


def test_what_failed_later_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    context, called = OneAtATime(), []

    def fails() -> None:
        raise RuntimeError("no GPU")

    with caplog.at_level(logging.ERROR), context:
        context.when_free(fails)
        context.when_free(lambda: called.append(1))
        with context:
            pass
        assert not called
    assert called == [1]
    assert "no GPU" in caplog.text


def test_nothing_is_forgotten_and_nothing_overlaps() -> None:
    """Whether a thread finds the context free or not."""
    context, inside, done = OneAtATime(), [], []

    def job() -> None:
        inside.append(1)
        assert len(inside) == 1
        inside.pop()
        done.append(1)

    def work() -> None:
        for _ in range(300):
            context.when_free(job)
            with context:
                inside.append(1)
                assert len(inside) == 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENOUGH)
    assert len(done) == 8 * 300


def interrupted(work: Callable[[], object], at: Mapping[int, Callable[[], object]]) -> int:
    """Do work, and call functions before its instructions of these numbers in `waits`. Returns how many there were."""
    numbers = itertools.count()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != waits.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and (call := at.get(next(numbers))):
            call()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return next(numbers)


@pytest.mark.parametrize("second", ["thread", "finalizer"])
@pytest.mark.parametrize("first", ["thread", "finalizer"])
def test_nothing_is_forgotten_wherever_a_thread_is_interrupted(
    first: str, second: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By another thread, or by a finalizer in the thread itself, twice."""
    context, given, done = OneAtATime(), [], []

    def add() -> None:
        given.append(1)
        context.when_free(lambda: done.append(1))

    def add_in_a_thread() -> None:
        thread = threading.Thread(target=add)
        thread.start()
        thread.join(ENOUGH)
        assert not thread.is_alive()

    calls = {"thread": add_in_a_thread, "finalizer": add}
    count = interrupted(add, {})
    for one, other in itertools.combinations(range(count), 2):
        interrupted(add, {one: calls[first], other: calls[second]})
        assert len(done) == len(given), (one, other)
    assert len(given) > count * (count - 1)  # both, nearly always: after the first, fewer instructions may be left
    assert not caplog.records
