"""Makes the pictures of shards with one model, on one device. Independent of Ray: the same class runs in any process."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image

from bulk import run as runs
from bulk.pages import Pages, encoded, line_of, line_of_picture
from bulk.rows import Job, batches, job_of
from bulk.shard import ShardFiles
from bulk.storage import Folder
from serving.inputs import parts_of, seeds_of
from serving.service import Prepared, Service
from serving.settings import Settings

logger = logging.getLogger(__name__)

FLAGGED = "The safety checker flagged the picture."
# Threads that write picture files while the model makes the next ones: encoding a WebP file of 1024x1024 takes some 0.1 s.
SAVERS = min(4, os.cpu_count() or 1)
# Batches whose pictures may wait for them.
WAITING = 4

# Told what is done of a shard: rows, pictures, and lines with an error.
Report = Callable[[int, int, int], None]


class GpuLostError(RuntimeError):
    """This process can no longer use the GPU; another one may."""


class Maker:
    """A loaded model that makes the shards of a run.

    Args:
        output: URL of the run's folder, see `bulk.run`.

    Raises:
        WeightsError, ValueError: as `Service.load`.
    """

    def __init__(self, output: str) -> None:
        self.output = Folder(output)
        self.run = runs.read(self.output)
        self.service = Service.load(Settings.from_environment(), max_batch=self.run.batch)
        # Reads the pictures of the next batch while the model works.
        self.reader = ThreadPoolExecutor(1, "read")
        self.savers = ThreadPoolExecutor(SAVERS, "save")

    def make(self, shard: int, report: Report = lambda *_: None) -> dict[str, Any]:
        """Make a shard, and put it into the output's folder. Rows that are not allowed get an error.

        Args:
            shard: its number.
            report: called after each batch.

        Returns:
            The shard's statistics, see `bulk.shard`.

        Raises:
            GpuLostError: the GPU does not answer any more.
            OSError: the shard cannot be written.
        """
        jobs = [job_of(self.run, number, row) for number, row in runs.rows_of(self.output, self.run, shard)]
        good = [job for job in jobs if not job.error]
        with ShardFiles(self.run, shard) as files:
            pages = Pages(files, self.savers, WAITING * self.run.batch)
            for job in jobs:
                if job.error:
                    pages.fail(line_of(job, self.run.keep), job.error)
            rows = len(jobs) - len(good)
            together = list(batches(good, self.run.batch))
            upcoming = [self.reader.submit(self._read, batch) for batch in together[:1]]
            for place, batch in enumerate(together):
                readied = upcoming.pop().result()
                upcoming += [self.reader.submit(self._read, later) for later in together[place + 1 : place + 2]]
                self._make(readied, pages)
                rows += len(batch)
                report(rows, pages.pictures, pages.failed)
            pages.finish()
            return files.publish(self.output)

    def _read(self, batch: Sequence[Job]) -> list[tuple[Job, Prepared | str]]:
        """With each job, its request; or why there is none. Runs no network."""
        return [(job, self._ready(job)) for job in batch]

    def _ready(self, job: Job) -> Prepared | str:
        try:
            with self.service.prepared(job.given) as ready:
                return ready
        except Exception as error:
            return said(error)

    def _make(self, batch: Sequence[tuple[Job, Prepared | str]], pages: Pages) -> None:
        """Make a batch; if that fails, each row alone: so it is the row that fails."""
        good = []
        for job, ready in batch:
            if isinstance(ready, str):
                pages.fail(line_of(job, self.run.keep), ready)
            else:
                good.append((job, ready))
        if not good:
            return
        start = time.perf_counter()
        try:
            images = self._images(good)
        except Exception as error:
            logger.warning("A batch of %d rows failed, and is made row by row: %s", len(good), said(error))
            images = None
        if images is None:  # outside of the except block, which would keep the error's tensors
            for job, ready in good:
                self._make_alone(job, ready, pages)
            return
        seconds = (time.perf_counter() - start) / len(images)
        made = iter(images)
        for job, ready in good:
            for index, seed in enumerate(seeds_of(ready.request)):
                line = line_of_picture(job, self.run.keep, ready, index, seed, seconds)
                image = next(made)
                if image is None:
                    pages.fail(line, FLAGGED)
                else:
                    encode = partial(encoded, image, ready, index, seed, self.service.settings.metadata)
                    pages.add(line, ready.inputs["output_format"], encode)

    def _images(self, batch: Sequence[tuple[Job, Prepared]]) -> list[Image.Image | None]:
        """The pictures of a batch, in order; None for those that the safety checker flags."""
        parts = [(part, ready) for _, ready in batch for part in parts_of(ready.request)]
        made = self.service.cascade.batch([part for part, _ in parts])
        return [
            None if self._flags(ready, image) else image
            for (_, ready), images in zip(parts, made, strict=True)
            for image in images
        ]

    def _flags(self, ready: Prepared, image: Image.Image) -> bool:
        safety = None if ready.inputs["disable_safety_checker"] else self.service.safety
        return safety is not None and self.service.cascade.runner.with_room(partial(safety.flags, image))

    def _make_alone(self, job: Job, ready: Prepared, pages: Pages) -> None:
        """Make a row as a server does, with its care and its sentences."""
        metrics: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            files = self.service.predict(job.given, metrics.__setitem__)
        except Exception as error:
            if self.service.gpu_is_lost:
                raise GpuLostError(f"This process lost the GPU at row {job.number}: {said(error)}") from error
            pages.fail(line_of(job, self.run.keep), said(error))
            return
        seconds = (time.perf_counter() - start) / len(files)
        there = {int(file.stem.rpartition("-")[2]): file for file in files}
        for index, seed in enumerate(metrics["seeds"]):
            line = line_of_picture(job, self.run.keep, ready, index, seed, seconds)
            if index in there:
                pages.add(line, there[index].suffix[1:], partial(bytes, there[index].read_bytes()))
            else:
                pages.fail(line, FLAGGED)


def said(error: Exception) -> str:
    """An error's text; of one that has none, its type."""
    return str(error) or type(error).__name__
