"""Ctrl-C and SIGTERM: training finishes the step and saves before it ends."""

import signal
import threading
import time
from types import FrameType
from typing import Any


class Stopped(Exception):
    """Training was stopped by Ctrl-C or SIGTERM, and has saved a checkpoint.

    Attributes:
        signal: number of the signal.
        step: number of steps that are done.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal, self.step = number, step


class Interruption:
    """Notes the first Ctrl-C or SIGTERM while its block runs, so that the step can be finished; a second one ends at once.

    Signals that the process ignores stay ignored. It does nothing outside of the main thread, which alone receives signals.
    """

    # Seconds in which further signals count as the first one: torchrun passes Ctrl-C on to processes that already got it.
    same_seconds = 2.0

    def __init__(self) -> None:
        self.signal: int | None = None
        self._heard = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._heard = number, time.monotonic()
        elif time.monotonic() - self._heard > self.same_seconds:
            self.__exit__()
            signal.raise_signal(number)
