"""The lines and pictures of a shard: encoded on threads while the model makes the next ones, and written in order."""

import hashlib
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from bulk.rows import Job
from bulk.shard import ShardFiles, kept, written
from cascade.images.metadata import save_picture
from serving.inputs import PICTURES
from serving.metadata import Detail, metadata
from serving.service import Prepared


class Pages:
    """What a shard's files get.

    Args:
        files: of the shard.
        threads: encode pictures.
        waiting: most pictures that wait for being encoded or written.

    Attributes:
        pictures, failed: how many lines have a picture, and how many an error.
    """

    def __init__(self, files: ShardFiles, threads: ThreadPoolExecutor, waiting: int) -> None:
        self.files = files
        self.threads = threads
        self.waiting = waiting
        self.queue: deque[tuple[dict[str, Any], str, Future[bytes]]] = deque()
        self.pictures = self.failed = 0

    def add(self, line: dict[str, Any], ending: str, encode: Callable[[], bytes]) -> None:
        """Add a picture.

        Args:
            line: its values, see `line_of`.
            ending: of its file, as in "webp".
            encode: returns the file's content; called on a thread.

        Raises:
            OSError: an earlier picture could not be written.
        """
        self.queue.append((line, ending, self.threads.submit(encode)))
        self.pictures += 1
        self._write(self.waiting)

    def fail(self, line: dict[str, Any], error: str) -> None:
        """Add a line without a picture, and why it has none."""
        self.files.fail(line, error)
        self.failed += 1

    def finish(self) -> None:
        """Write all that waits.

        Raises:
            OSError: a picture could not be written.
        """
        self._write(0)

    def _write(self, waiting: int) -> None:
        while len(self.queue) > waiting:
            line, ending, content = self.queue.popleft()
            picture = content.result()
            self.files.add({**line, "sha256": hashlib.sha256(picture).hexdigest()}, ending, picture)


def encoded(image: Image.Image, ready: Prepared, index: int, seed: int, detail: Detail) -> bytes:
    """A picture's file, as `serving.service` writes it.

    Args:
        image: the picture.
        ready: what it was made of.
        index, seed: its place among the request's pictures, and its seed.
        detail: how much the file says.
    """
    said = metadata(ready.record.of_picture(index, seed, *image.size), detail)
    with tempfile.TemporaryDirectory(prefix="cascade-") as folder:
        file = Path(folder) / f"picture.{ready.inputs['output_format']}"
        save_picture(image, file, said, ready.inputs["output_quality"])
        return file.read_bytes()


def line_of(job: Job, keep: dict[str, str]) -> dict[str, Any]:
    """The line of a row that has no picture: see `bulk.shard.schema`. Inputs that are not allowed are left out."""
    seed = {**job.given, **job.inputs}.get("seed")
    known = {**job.given, **job.inputs, **as_given(job), "seed": seed % 2**32 if type(seed) is int else None}
    return {"key": job.key, "row": job.number, "index": 0, **written(known), **kept(job.values, keep)}


def line_of_picture(
    job: Job, keep: dict[str, str], ready: Prepared, index: int, seed: int, seconds: float
) -> dict[str, Any]:
    """The line of one of a row's pictures, with the inputs that make it.

    Args:
        index, seed: its place among the row's pictures, and its seed.
        seconds: what it took.
    """
    size = {"width": ready.request.width, "height": ready.request.height}
    known = {**job.inputs, **ready.record.inputs, **as_given(job), **size, "seed": seed}
    line = {"key": job.key_of(index), "row": job.number, "index": index, "seconds": round(seconds, 4)}
    return {**line, **written(known), **kept(job.values, keep)}


def as_given(job: Job) -> dict[str, Any]:
    """Pictures among a row's inputs as the table has them."""
    return {name: job.values[name] for name in PICTURES if name in job.values}
