"""Functions that compile kernels run in parallel, whatever Python does meanwhile."""

import ast
import gc
import inspect
import sys
import threading
from collections.abc import Iterator

import pytest

from cascade.kernels import parallel, plain

SOURCE = inspect.getsource(plain)


@pytest.fixture
def busy_collection() -> Iterator[None]:
    """Threads take turns as often as possible, and each collection of garbage runs Python code."""
    interval = sys.getswitchinterval()

    def callback(phase: str, info: dict) -> None:
        sum(range(200))

    gc.callbacks.append(callback)
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.callbacks.remove(callback)


def test_sources_are_parsed_at_the_same_time(busy_collection: None) -> None:
    parallel.in_threads([lambda: ast.parse(SOURCE)] * 200)


def test_all_functions_run_and_errors_are_raised() -> None:
    ran: list[int] = []
    started = threading.Event()
    parallel.in_threads([lambda: ran.append(1), started.set, lambda: ran.append(2)])
    assert sorted(ran) == [1, 2]
    assert started.is_set()

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        parallel.in_threads([fails])
    assert gc.isenabled()


def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        parallel.in_threads([])
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_collection_stays_off_until_the_last_has_ended() -> None:
    """When two models are loaded at the same time."""
    first_ended, second_began = threading.Event(), threading.Event()
    seen: list[bool] = []

    def second() -> None:
        second_began.set()
        assert first_ended.wait(60)
        seen.append(gc.isenabled())

    other = threading.Thread(target=parallel.in_threads, args=([second],))
    parallel.in_threads([other.start, lambda: second_began.wait(60)])
    first_ended.set()
    other.join()
    assert seen == [False]
    assert gc.isenabled()
