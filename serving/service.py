"""A loaded model that turns inputs into files and metrics, one prediction at a time. Independent of any server."""

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cascade.images.metadata import save_picture
from cascade.limits import InputError, counted
from cascade.pipeline import Cascade
from cascade.progress import Progress
from cascade.prompts.reading import embedding_files
from cascade.request import Request, smaller_requests
from cascade.running.device import ADDS, SettingError, choose_device
from cascade.running.errors import is_lost, is_out_of_memory
from cascade.safety import SafetyChecker, find_safety_checker
from cascade.weights import ModelFolder
from cascade.weights.errors import shortened
from serving.digests import digest
from serving.earlier import current
from serving.image_urls import downloaded
from serving.inputs import PICTURES, check_inputs, parts_of, request_from, seeds_of
from serving.lora_sources import without_secrets
from serving.loras import Loras
from serving.metadata import Detail, metadata
from serving.peak_memory import peak_memory, reset_peak_memory
from serving.progress import Stopwatch, iterate_on, reported, shown, timed, with_previews
from serving.record import Embedding, Origin, Record
from serving.settings import Settings
from serving.threads import finishing
from serving.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

# Bytes. Four PNG pictures of the largest size need less.
DISK_NEEDED = 210_000_000
# Picture files that are written at a time.
FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Prepared:
    """What inputs ask for.

    Attributes:
        request: what the model is asked to make.
        record: how its pictures are made, for all of them.
        inputs: checked, with URLs replaced by files.
    """

    request: Request
    record: Record
    inputs: Mapping[str, Any]


class Service:
    """A loaded model with everything that a server needs. Use `load`.

    Args:
        cascade: the model.
        origin: describes the model in metadata.
        safety: checks the pictures; None: pictures are not checked.
        settings: of the server.
    """

    def __init__(
        self, cascade: Cascade, origin: Origin | None, safety: SafetyChecker | None, settings: Settings
    ) -> None:
        self.cascade = cascade
        self.origin = origin
        self.safety = safety
        self.settings = settings
        self.gpu_is_lost = False
        self._asked = threading.Event()  # whether there has been a prediction
        self.watch = Stopwatch(cascade.device)
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        self.model_thread = ThreadPoolExecutor(1, "model")
        self.vocabulary = Vocabulary.of(settings.weights)
        self.file_threads = ThreadPoolExecutor(min(FILES_AT_ONCE, os.cpu_count() or 1), "files")
        self.loras = Loras(settings.weights / "loras", settings.loras, public_only=settings.urls.public_only)

    @classmethod
    def load(cls, settings: Settings, max_batch: int = 4) -> "Service":
        """Load the safety checker and the model. Downloads nothing, unless `settings.download` says so.

        Args:
            settings: of the server.
            max_batch: how many pictures are made at a time, see `Cascade`.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: CASCADE_DOWNLOAD, _DEVICE, _DTYPE, _MEMORY or _PRECISION has a value that is not allowed.
        """
        if settings.download:
            from serving.fetching import fetch_missing  # takes a tenth of a second

            fetch_missing(settings.download, settings.weights)
        opened = ModelFolder.open(settings.weights)
        wanted = {name: getattr(settings, name) for name in ("device", "dtype", "memory", "precision")}
        try:
            device, _, _ = choose_device(wanted["device"], wanted["dtype"])
            # First, so that the model's memory mode is chosen by the memory that is left.
            safety = load_safety_checker(settings.weights, device)
            start = time.perf_counter()
            log_prompts = settings.metadata is Detail.FULL
            cascade = Cascade.load(settings.weights, **wanted, max_batch=max_batch, log_prompts=log_prompts)
        except SettingError as error:
            raise ValueError(f"CASCADE_{error.name.upper()} {error.problem}") from None
        logger.info(
            "Loaded %s from %s, %.2f GB, onto %s as %s%s, %s, in %.1f s.",
            opened.name,
            settings.weights,
            size_of(opened) / 1e9,
            cascade.device,
            str(cascade.prior.dtype).removeprefix("torch."),
            ADDS[cascade.precision],
            cascade.runner.description,
            time.perf_counter() - start,
        )
        return cls(cascade, Origin.of(cascade, opened), safety, settings)

    def warm_up(self) -> None:
        """Do what the first prediction would do, on the model's thread, until there is a prediction. Returns at once."""
        self.model_thread.submit(self._warm_up)

    def _warm_up(self) -> None:
        Image.preinit()  # imports the formats
        if self.cascade.device.type == "cuda":
            self._make_unasked()

    def _make_unasked(self) -> None:
        """Make a picture that nobody has asked for, until somebody asks for one."""
        if self._asked.is_set():
            return
        # One step of each stage captures all graphs of the native size, and loads what libraries load late.
        side = self.cascade.native_size
        steps = self.cascade.steps(Request("", width=side, height=side, steps_prior=1, steps_decoder=1))
        try:
            for progress in steps:
                if progress.image is not None and self.safety is not None:
                    self.cascade.runner.with_room(partial(self.safety.flags, progress.image))
                if self._asked.is_set():
                    break
        except RuntimeError as error:  # a prediction reports it
            logger.info("No picture was made at the start, so the first takes longer: %s", shortened(error))
        finally:
            steps.close()

    def is_healthy(self) -> bool:
        """Whether predictions can work: the GPU answers, and the disk has room. Takes microseconds.

        Once the GPU is lost, this stays False: only a new process can use the GPU again.
        """
        if self.cascade.device.type == "cuda" and not self.gpu_is_lost:
            try:
                torch.cuda.current_stream(self.cascade.device).query()  # does not wait for it
            except RuntimeError:
                self._look_after_gpu()
        return not self.gpu_is_lost and shutil.disk_usage(tempfile.gettempdir()).free > DISK_NEEDED

    def predict(
        self,
        given: Mapping[str, Any],
        record_metric: Callable[[str, Any], None],
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[Path]:
        """Make the pictures of a request. Their files are deleted when the next prediction starts.

        Args:
            given: the inputs by name, see `inputs.check_inputs` and, for names of earlier versions, `earlier`.
            record_metric: called with a name and a value, see docs/http.md.
            on_progress: called after every piece of work; an exception from it ends the prediction.

        Returns:
            The files, in the order of the metric "seeds".

        Raises:
            ValueError: an input is not allowed, a file is not a picture, the model lacks a network that the inputs need,
                the GPU's memory does not suffice, or the safety checker flagged every picture.
        """
        self._asked.set()
        self.outputs.cleanup()
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        with self.prepared(given) as ready:
            self._warn_of_unknown_words(ready.request)
            # What `warm_up` has begun ends first: its time and memory are not the prediction's.
            self.model_thread.submit(lambda: None).result()
            try:
                return self._with_care(ready.request, lambda: self._make(ready, record_metric, on_progress))
            except InputError as error:
                raise self.loras.explained(error, ready.inputs["lora_weights"], ready.request.loras) from None

    @contextlib.contextmanager
    def prepared(self, given: Mapping[str, Any]) -> Iterator[Prepared]:
        """The request that inputs describe. Runs no network. What is downloaded for it is deleted at the end.

        Args:
            given: the inputs by name, see `inputs.check_inputs`.

        Raises:
            InputError: an input is not allowed, or a file is not a picture.
        """
        given = current(given)
        checked = check_inputs(given)
        weights = checked["lora_weights"]
        loras = self.loras.find(weights, checked["lora_scales"])
        with downloaded(checked, PICTURES, self.settings.urls) as inputs:
            request = replace(request_from(inputs, self.cascade), loras=loras)
            files = {name: inputs[name] for name in PICTURES}
            texts = {"lora_weights": [without_secrets(text) for text in weights]}
            hashed = self.settings.metadata is Detail.FULL
            planner = self.cascade.planner
            record = Record.of(
                request,
                given | files | texts,
                self.origin,
                planner.sampling(request),
                hashed=hashed,
                loras=self.loras.recorded(planner.loras(request), hashed=hashed),
                embeddings=self._embeddings(request) if hashed else (),
            )
            yield Prepared(request, record, inputs)

    def _embeddings(self, request: Request) -> list[Embedding]:
        """Those that the prompts name, without what cannot be read: the model says so."""
        found: dict[str, Path] = {}
        for prompt in (request.prompt, request.negative_prompt):
            found |= embedding_files(prompt, self.cascade.text.embeddings, weighting=request.prompt_weighting)
        return [Embedding(name, digest(file)) for name, file in sorted(found.items()) if os.access(file, os.R_OK)]

    def _with_care(self, request: Request, make: Callable[[], list[Path]]) -> list[Path]:
        """Call `make`. If it fails, delete the files, check the GPU, and explain a lack of memory."""
        try:
            try:
                return make()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # After the except block, so that the error and the tensors its traceback held are freed before smaller sizes
            # are tried.
            raise ValueError(self._what_would_fit(request))
        except BaseException as error:  # Cog cancels by a BaseException
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                logger.exception("The prediction failed.")  # Cog shows only the message
            error.__traceback__ = None  # its frames would keep tensors alive
            self.outputs.cleanup()
            self._look_after_gpu()
            raise

    def _warn_of_unknown_words(self, request: Request) -> None:
        """Log the words of the prompt that the model does not know, if its folder says which it knows. LoRAs bring more."""
        unknown = self.vocabulary.unknown(request.prompt) if self.vocabulary and not request.loras else []
        if not unknown:
            return
        if self.settings.metadata is Detail.FULL:
            said = ", ".join(unknown)
            logger.warning("The prompt has words that the model does not know: %s.", shortened(said))
        else:
            logger.warning("The prompt has %s that the model does not know.", counted(len(unknown), "word"))

    def _make(
        self,
        ready: Prepared,
        record_metric: Callable[[str, Any], None],
        on_progress: Callable[[Progress], None] | None,
    ) -> list[Path]:
        request, inputs = ready.request, ready.inputs
        ending, quality = inputs["output_format"], inputs["output_quality"]
        safety = None if inputs["disable_safety_checker"] else self.safety
        if inputs["previews"]:
            self.cascade.planner.check_previewer()
        seeds = seeds_of(request)
        logger.info("Seeds: %s", ", ".join(map(str, seeds)))
        record_metric("seeds", seeds)
        if request.speed != "exact":
            logger.info("Speed %s: %s.", request.speed, self.cascade.planner.sampling(request))
        self.watch.restart()
        reset_peak_memory(self.cascade.device)

        kept: dict[int, Path] = {}
        steps = self._steps(request)
        if on_progress is not None:
            steps = reported(steps, on_progress)
        if inputs["previews"]:
            steps = with_previews(
                steps, lambda latents: self._preview(latents, safety), partial(record_metric, "previews")
            )
        images = (progress.image for progress in steps if progress.image is not None)
        with finishing(self.file_threads) as later:
            for index, image in enumerate(images):
                if safety is not None:
                    flagged = self._flags(safety, image)
                    self.watch.lap("safety")
                    if flagged:
                        logger.warning("Picture %d (seed %d) was flagged by the safety checker.", index, seeds[index])
                        continue
                kept[index] = Path(self.outputs.name) / f"out-{index}.{ending}"
                said = metadata(ready.record.of_picture(index, seeds[index], *image.size), self.settings.metadata)
                later(save_picture, image, kept[index], said, quality)
        self.watch.lap("encoding")

        record_metric("flagged", request.num_images - len(kept))
        if not kept:
            raise ValueError(
                "The safety checker flagged every picture, so none is returned; another prompt or seed may help."
            )
        record_metric("seeds", [seeds[index] for index in kept])
        record_metric("pixels", len(kept) * request.width * request.height)
        record_metric("peak_memory_gb", round(peak_memory(self.cascade.device) / 1e9, 3))
        for name, seconds in self.watch.seconds.items():
            record_metric(f"seconds.{name}", round(seconds, 4))
        return list(kept.values())

    def _steps(self, request: Request) -> Iterator[Progress]:
        """The steps of the request, shown and timed."""
        parts = (iterate_on(self.model_thread, self.cascade.steps(part)) for part in parts_of(request))
        return timed(shown(parts), self.watch)

    def _preview(self, latents: Tensor, safety: SafetyChecker | None) -> list[Image.Image]:
        """Small pictures of Stage C's latents, without those that the safety checker flags.

        They are sent as a metric, because clients and webhooks get only a metric's latest value, but the whole log. Cog
        has server-sent events only for outputs that are iterators.
        """
        images = self.model_thread.submit(self.cascade.preview, latents).result()
        images = [image for image in images if safety is None or not self._flags(safety, image)]
        self.watch.lap("previews")
        return images

    def _flags(self, safety: SafetyChecker, image: Image.Image) -> bool:
        return self.model_thread.submit(self.cascade.runner.with_room, partial(safety.flags, image)).result()

    def _what_would_fit(self, request: Request) -> str:
        """Error text for a request that does not fit on the GPU. Tries smaller sizes and names the first that works."""
        asked = f"A picture of {request.width}x{request.height} needs more memory than the GPU has left"
        smaller = request
        for smaller in smaller_requests(request):
            try:
                steps = self.cascade.steps(replace(smaller, steps_prior=1, steps_decoder=1))
                for _ in iterate_on(self.model_thread, steps):
                    pass
                return f"{asked}; one of {smaller.width}x{smaller.height} would fit."
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        return f"{asked}, and so does one of {smaller.width}x{smaller.height}: something else must be using it."

    def _look_after_gpu(self) -> None:
        """After an error, find out whether the GPU can still be used, and free unused memory."""
        if self.cascade.device.type != "cuda" or self.gpu_is_lost:
            return
        if is_lost(self.cascade.device):
            self.gpu_is_lost = True
            logger.error("This process can no longer use the GPU: the health check fails from now on.")
        else:
            torch.cuda.empty_cache()


def load_safety_checker(model_folder: Path, device: torch.device) -> SafetyChecker | None:
    """The safety checker in a model folder or beside it; None if there is none. Logs which."""
    folder = find_safety_checker(model_folder)
    if folder is None:
        logger.warning("There is no safety_checker in %s or beside it: no picture will be checked.", model_folder)
        return None
    start = time.perf_counter()
    checker = SafetyChecker.load(folder, device)
    logger.info("Loaded the safety checker from %s in %.1f s.", folder, time.perf_counter() - start)
    return checker


def size_of(opened: ModelFolder) -> int:
    """Bytes of all components' files."""
    files = (file for part in opened.parts.values() for file in ([part] if part.is_file() else part.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())
