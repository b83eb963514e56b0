"""What is told of a request while it runs: lines in the log, seconds by stage, previews. All of it comes from `Progress`."""

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
    """Iterate, with every step computed on one thread, whichever of Cog's threads asks for it.

    Cog runs predictions now on one thread, now on another, and each would have its own of what libraries keep for a
    thread: OpenMP helpers, oneDNN buffers, malloc arenas, cuBLAS workspaces. On two cores, with no GPU, it was 70 MB.
    """
    try:
        while (progress := thread.submit(next, steps, None).result()) is not None:
            yield progress
    finally:  # whoever cancels waits for the step that is computed
        thread.submit(steps.close).result()


class Stopwatch:
    """Adds up seconds by name. Work on a GPU is timed there: waiting for each step would leave the GPU idle after it.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.laps: list[tuple[str, Any]] = [("", self._now())]

    def lap(self, name: str) -> None:
        """Add the time since the last lap, or the start, to a name. Returns when the GPU has finished the lap before."""
        self.laps.append((name, self._now()))
        if self.device.type == "cuda":
            self.laps[-2][1].synchronize()

    @property
    def seconds(self) -> dict[str, float]:
        """By name, in the order in which they first occurred."""
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
    """The work, with a lap of the watch for each piece: by its stage, but pictures count as part of the decoder."""
    for progress in steps:
        watch.lap("decoder" if progress.stage == "image" else progress.stage)
        yield progress


class ProgressLines(tqdm):
    """tqdm for a log: a line for every state, instead of one line that is overwritten."""

    @staticmethod
    def status_printer(file: typing.TextIO) -> Callable[[str], None]:
        def write(state: str) -> None:
            file.write(f"{state}\n")
            file.flush()

        return write


def shown(parts: Iterable[Iterator[Progress]]) -> Iterator[Progress]:
    """The work of several requests, one after the other, with a bar of the progress on stderr."""
    # Lines are for Replicate, which finds the progress in those that begin with a percentage.
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
    """The work; after each step of Stage C small pictures of it are shown, as data URLs, and in the end none.

    Args:
        steps: the work.
        preview: makes small pictures of Stage C's latents.
        show: is given the pictures.
    """
    for progress in steps:
        if progress.stage == "prior":
            show([as_data_url(image) for image in preview(progress.latents)])
        yield progress
    show([])  # the pictures have taken their place


def as_data_url(image: Image.Image) -> str:
    """A picture as the data URL of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=PREVIEW_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
