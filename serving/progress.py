"""Log lines, seconds by stage and previews of a running request, made from the `Progress` that the engine yields."""

import base64
import io
import itertools
import sys
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.progress import Progress

PREVIEW_QUALITY = 80


def iterate_on(thread: ThreadPoolExecutor, steps: Generator[Progress, None, None]) -> Iterator[Progress]:
    """Iterate, and compute every step on one thread.

    Cog may run each prediction on another thread, and libraries keep state for each thread (OpenMP workers, oneDNN
    buffers, malloc arenas, cuBLAS workspaces): 70 MB on two cores without a GPU.
    """
    try:
        while (progress := thread.submit(next, steps, None).result()) is not None:
            yield progress
    finally:  # a cancellation waits for the running step
        thread.submit(steps.close).result()


class Stopwatch:
    """Adds up seconds by name. On a GPU it uses CUDA events, because waiting for each step would leave the GPU idle.

    Args:
        device: does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """Add the time since the last lap, or the start, to a name. Waits until the GPU has finished the previous lap."""
        self.laps.append((name, self._now()))
        if self.device.type == "cuda":
            self.laps[-2][1].synchronize()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by name, in the order in which the names first occurred."""
        sums: dict[str, float] = defaultdict(float)
        for (_, before), (name, after) in itertools.pairwise(self.laps):
            if self.device.type == "cuda":
                after.synchronize()
                sums[name] += before.elapsed_time(after) / 1000
            else:
                sums[name] += after - before
        return sums

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def timed(steps: Iterable[Progress], watch: Stopwatch) -> Iterator[Progress]:
    """Pass on the progress, and add a lap to the watch for each step: by stage; "tiles" and "image" count as "decoder"."""
    for progress in steps:
        watch.lap("decoder" if progress.stage in ("tiles", "image") else progress.stage)
        yield progress


def reported(steps: Iterable[Progress], report: Callable[[Progress], None]) -> Iterator[Progress]:
    """Pass on the progress, and call `report` after each piece of work. An exception from it ends the work."""
    for progress in steps:
        report(progress)
        yield progress


class ProgressLines(tqdm):
    """tqdm for a log: writes a new line for every state instead of overwriting one line."""

    @staticmethod
    def status_printer(file: typing.TextIO) -> Callable[[str], None]:
        def write(state: str) -> None:
            file.write(f"{state}\n")
            file.flush()

        return write


def shown(parts: Iterable[Iterator[Progress]]) -> Iterator[Progress]:
    """The progress of several requests, one after the other, shown as a progress bar on stderr."""
    # Without a terminal, lines: Replicate reads the progress from lines that begin with a percentage.
    bar_class = tqdm if sys.stderr.isatty() else ProgressLines
    with bar_class(unit="step", mininterval=0, delay=1e-6) as bar:  # the total is known after the first step
        for part in parts:
            before = bar.n
            for progress in part:
                bar.total = before + progress.total
                bar.set_postfix_str(progress.stage, refresh=False)
                bar.update()
                yield progress


def with_previews(
    steps: Iterable[Progress],
    preview: Callable[[Tensor], list[Image.Image]],
    show: Callable[[list[str]], None],
) -> Iterator[Progress]:
    """Pass on the progress, and show small pictures after each step of Stage C.

    Args:
        steps: the progress of a request.
        preview: makes small pictures of Stage C's latents.
        show: called with the pictures as data URLs; at the end with none.
    """
    for progress in steps:
        if progress.stage == "prior":
            show([as_data_url(image) for image in preview(progress.latents)])
        yield progress
    show([])  # the finished pictures replace them


def as_data_url(image: Image.Image) -> str:
    """A picture as the data URL of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=PREVIEW_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
