"""Runs functions that compile Triton kernels, in parallel."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

MOST_THREADS = 16


def in_threads(jobs: Iterable[Callable[[], object]]) -> None:
    """Call all functions, each in one of several threads, and return when all have ended.

    An error of one is raised, and functions that have not begun are not called.

    Garbage is not collected meanwhile. Python 3.11 collects it in the middle of ``ast.parse``, with which Triton reads a
    kernel, and a callback or finalizer of the garbage lets other threads run. If one of those parses as well, both count
    into the same depth, and fail: "AST constructor recursion depth mismatch" (python/cpython#106905). Of 60 kernels' files
    parsed in 8 threads, with a callback in ``gc.callbacks``, 2 failed. From 3.12 on, Python collects between instructions.
    """
    with _without_collection(), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda job: job(), jobs))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
