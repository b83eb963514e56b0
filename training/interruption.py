"""Ctrl-C and SIGTERM: a step is finished and saved before training ends."""

import signal
import threading
import time
from types import FrameType
from typing import Any


class Stopped(Exception):
    """Training was asked to stop, by Ctrl-C or SIGTERM, and has saved a checkpoint.

    Attributes:
        signal: its number.
        step: how many steps are done.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.signal, self.step = number, step


class Interruption:
    """Notes Ctrl-C and SIGTERM while its block runs, so that a step is finished and saved; a later one ends at once.

    Signals that the process ignores stay ignored. Outside of the main thread, which alone hears signals, it does nothing.
    """

    # torchrun passes Ctrl-C on to processes that have heard it already, at once.
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
