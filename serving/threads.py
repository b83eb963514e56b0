"""Work on threads that is finished when a block ends."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import Any


@contextmanager
def finishing(threads: Executor) -> Iterator[Callable[..., None]]:
    """A context in which work can be handed to threads. All of it has ended when the context ends.

    Yields:
        A function that takes a function and its arguments, and returns at once.

    Raises:
        Exception: the first, in the order in which the work was handed over, that the work raised. If the block itself raises,
            work that has not begun is dropped, and the block's exception is raised.
    """
    handed: list[Future[Any]] = []

    def later(work: Callable[..., Any], *arguments: Any) -> None:
        handed.append(threads.submit(work, *arguments))

    try:
        yield later
        for future in handed:
            future.result()
    finally:
        for future in handed:
            future.cancel()
        wait(handed)
