"""Work on threads that has ended when its block ends."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.threads import finishing


def test_all_work_has_ended() -> None:
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    with ThreadPoolExecutor(2) as threads, finishing(threads) as later:
        for number in range(5):
            later(work, number)
    assert sorted(done) == list(range(5))


def test_the_first_error_is_raised_when_all_has_ended() -> None:
    def fail(text: str) -> None:
        raise OSError(text)

    def hand(threads: ThreadPoolExecutor) -> None:
        with finishing(threads) as later:
            later(fail, "one")
            later(fail, "two")

    with ThreadPoolExecutor(1) as threads, pytest.raises(OSError, match="one"):
        hand(threads)


def test_a_cancellation_waits_for_what_runs_and_drops_the_rest() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go.wait()
        done.append("first")

    def cancel(threads: ThreadPoolExecutor) -> None:
        with finishing(threads) as later:
            later(work)
            later(done.append, "second")
            begun.wait()
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with ThreadPoolExecutor(1) as threads, pytest.raises(KeyboardInterrupt):
        cancel(threads)
    assert done == ["first"]
