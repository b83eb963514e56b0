"""A process in which Triton interprets."""

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.kernels.interpreting import mend


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Executor]:
    """It decides that when it is imported."""
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, get_context("spawn"), initializer=mend) as processes,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        processes.submit(int).result()  # started with that variable
        patch.undo()
        yield processes
