"""Keeps waits for a whole GPU apart from captures of CUDA graphs: such a wait breaks a capture, also in another thread."""

import logging
import threading
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)


class OneAtATime:
    """A context in which one thread captures a graph, or waits for a whole device. Other threads wait for its end.

    A thread that is inside may enter it again. Whoever enters must hold no lock that a capture takes.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        self._lock.release()
        self._call()

    def when_free(self, function: Callable[[], object]) -> None:
        """Call a function in this context: now, or at the end of what is in progress, by the thread that ends it.

        Never waits, so finalizers may use it: they run in any thread, whatever locks it holds. Errors are logged.
        """
        self._later.append(function)
        self._call()

    def _call(self) -> None:
        # Who finds the lock taken leaves the functions to its holder, who looks for them after it has released the lock.
        while self._later and self._lock.acquire(blocking=False):
            try:
                if self._depth:  # this thread is inside already, and looks for them when it leaves
                    return
                self._depth += 1
                try:
                    if self._later:  # neither another thread nor a finalizer in this one was faster
                        self._later.popleft()()
                except Exception:
                    logger.exception("Work that waited for the end of a capture failed.")
                finally:
                    self._depth -= 1
            finally:
                self._lock.release()


one_at_a_time = OneAtATime()
