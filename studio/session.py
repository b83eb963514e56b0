"""What a page keeps: the pictures made since it opened, the images used for them, and the one request that runs."""

import itertools
import queue
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cog
from PIL import Image

from cascade.progress import Progress
from cascade.request import Request
from cascade.weights.hashing import sha256
from serving.progress import iterate_on
from serving.service import Service

# Seconds between two looks at whether a request that waits for another one was cancelled.
PATIENCE = 0.1


class Cancelled(BaseException):
    """The user cancelled the request. No `Exception`, like the one by which Cog cancels: it is no failure to be logged."""


@dataclass(frozen=True)
class Made:
    """A picture of the gallery.

    Attributes:
        path: its file, as `Service.predict` wrote it.
        given: the inputs that made it, with the seed that was used; files as paths.
        index, seed: its place in the request, and its own seed.
    """

    path: Path
    given: Mapping[str, Any]
    index: int
    seed: int


@dataclass(frozen=True)
class State:
    """How far a running request is.

    Attributes:
        previews: small pictures of what Stage C predicts, as data URLs; none before its first step.
        done, total: pieces of work; total 0: not yet known.
        made: at the end, the pictures.
    """

    previews: tuple[str, ...] = ()
    done: int = 0
    total: int = 0
    made: tuple[Made, ...] = ()


class Session:
    """The pictures and images of a page, and the model that makes them.

    Args:
        service: the model. One request at a time uses it; others wait.
        folder: gets the pictures, and in `inputs/` the images that were used.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self.made: list[Made] = []
        self._images: dict[str, Path] = {}
        self._numbers = itertools.count(1)
        self._model = threading.Lock()
        (folder / "inputs").mkdir(parents=True, exist_ok=True)

    def warm_up(self) -> None:
        """Make a picture that nobody sees, so that the first request need not wait for what is compiled once."""
        steps = self.service.cascade.steps(Request("", steps_prior=1, steps_decoder=1))
        for progress in iterate_on(self.service.model_thread, steps):
            if progress.stage == "prior" and self.service.cascade.previewer is not None:
                self.service.model_thread.submit(self.service.cascade.preview, progress.latents).result()

    def keep(self, file: Path) -> tuple[Path, str]:
        """A copy of a file, byte for byte, which the session can find again by its sha256; and that."""
        digest = sha256(file)
        if digest not in self._images:
            kept = self.folder / "inputs" / f"{digest[:16]}{file.suffix.lower()}"
            if not kept.exists():
                shutil.copyfile(file, kept)
            self._images[digest] = kept
        return self._images[digest], digest

    def keep_drawn(self, image: Image.Image) -> Path:
        """A picture that was drawn on the page, as a PNG file that `find` finds."""
        drawn = self.folder / "inputs" / "drawn.png"
        image.save(drawn)
        return self.keep(drawn)[0]

    def find(self, digest: str) -> Path | None:
        """A picture or an image of the session by its sha256; None if it has no such."""
        return self._images.get(digest)

    def make(self, given: Mapping[str, Any], cancelled: threading.Event) -> Iterator[State]:
        """Make the pictures of a request: how far it is, after every step or as often as the caller looks.

        Args:
            given: inputs by name, see `inputs.check_inputs`.
            cancelled: set to end the request at its next step.

        Raises:
            Cancelled: it was.
            ValueError: as `Service.predict`.
        """
        given = {name: self._kept(value) for name, value in given.items()}
        given["previews"] = self.service.cascade.previewer is not None
        while not self._model.acquire(timeout=PATIENCE):
            if cancelled.is_set():
                raise Cancelled
            yield State()
        try:
            yield from self._run(given, cancelled)
        finally:
            self._model.release()

    def _run(self, given: dict[str, Any], cancelled: threading.Event) -> Iterator[State]:
        news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        metrics: dict[str, Any] = {}

        def record_metric(name: str, value: Any) -> None:
            metrics[name] = value
            if name == "previews" and value:
                news.put({"previews": tuple(value)})

        def on_progress(progress: Progress) -> None:
            if cancelled.is_set():
                raise Cancelled
            news.put({"done": progress.done, "total": progress.total})

        def work() -> None:
            try:
                files = self.service.predict(given, record_metric, on_progress)
                news.put({"made": self._added(files, given, metrics["seeds"])})
            except BaseException as error:
                news.put({"error": error})

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        state: dict[str, Any] = {}
        try:
            while "made" not in state:
                # All that has happened since the last look, as one state: the page may be slower than the model.
                state |= news.get()
                while not news.empty():
                    state |= news.get()
                if "error" in state:
                    raise state["error"]
                yield State(**state)
        finally:  # a page that was closed ends its request, too
            cancelled.set()
            worker.join()

    def _kept(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._kept(one) for one in value]
        return cog.Path(self.keep(Path(value))[0]) if isinstance(value, Path) else value

    def _added(self, files: list[Path], given: Mapping[str, Any], seeds: list[int]) -> tuple[Made, ...]:
        """The files as pictures of the gallery. Those that the safety checker flagged are not among them."""
        request = {name: value for name, value in given.items() if name != "previews"}
        added = []
        for file, seed in zip(files, seeds, strict=True):
            index = int(file.stem.rpartition("-")[2])
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{next(self._numbers):03}-{seed}{file.suffix}"
            path = self.folder / name
            shutil.copyfile(file, path)
            self._images[sha256(path)] = path
            first = (seed - index) % 2**32
            added.append(Made(path, {**request, "seed": first}, index, seed))
        self.made += added
        return tuple(added)
