"""Runs functions that compile Triton kernels, in parallel; and what they need: no garbage collection meanwhile."""

import gc
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

MOST_THREADS = 16


class _WithoutCollection:
    """A context in which no garbage is collected. Of several threads in it, the last to leave turns collection on again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._collects = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._collects = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._collects:
                gc.enable()


without_collection = _WithoutCollection()


def in_threads(jobs: Iterable[Callable[[], object]]) -> None:
    """Call all functions, each in one of several threads, and return when all have ended.

    An error of one is raised, and functions that have not begun are not called.

    Garbage is not collected meanwhile. Python 3.11 collects it in the middle of ``ast.parse``, with which Triton reads a
    kernel, and a callback or finalizer of the garbage lets other threads run. If one of those parses as well, both count
    into the same depth, and fail: "AST constructor recursion depth mismatch" (python/cpython#106905). Of 60 kernels' files
    parsed in 8 threads, with a callback in ``gc.callbacks``, 2 failed. From 3.12 on, Python collects between instructions.
    """
    with without_collection, ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda job: job(), jobs))
