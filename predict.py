"""The Predictor that Cog serves. Knows Cog: inputs, files, logs, metrics, cancellation; leaves pictures to ``cascade``.

Cog's schema generator reads this file without running it: what stands in an ``Input()`` is a literal or a constant of
this file, a description is one literal, and an input that may be left out is ``| None`` with the default None.
"""

import base64
import contextlib
import functools
import io
import itertools
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import typing
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from cog import BaseRunner, Input, Path
from PIL import Image
from tqdm import tqdm

from cascade.cascade import Cascade, Progress, find_device
from cascade.images.metadata import save_picture
from cascade.request import Request, smaller_requests
from cascade.safety import SafetyChecker, find_safety_checker
from cascade.weights import ModelFolder
from serving.inputs import PICTURES, check_inputs, downloaded, parts_of, request_from, seeds_of
from serving.metadata import Detail, metadata
from serving.record import Origin, Record

logger = logging.getLogger(__name__)

WEIGHTS = FilePath(__file__).parent / "weights"
RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
FORMATS = ["webp", "jpg", "png"]
# Seconds. What is logged just before setup ends, Cog may lose: on a busy machine, the last line in one start of six.
LAST_LINES = 0.2
# Four pictures of the largest size, as PNG, and some.
DISK_NEEDED = 200_000_000
PREVIEW_QUALITY = 80


class Predictor(BaseRunner):
    """Text and images to images."""

    cascade: Cascade | None = None

    def setup(self) -> None:
        """Load the safety checker and the model, onto the GPU if there is one. Fetches nothing.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: CASCADE_MEMORY is none of auto, resident, offload and stream, or CASCADE_METADATA none of full,
                settings and none.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.detail = Detail.from_environment()
        folder = find_weights()
        opened = ModelFolder.open(folder)
        # First, so that the model knows how much memory is left.
        self.safety = load_safety_checker(folder, find_device())
        start = time.perf_counter()
        memory = os.environ.get("CASCADE_MEMORY") or "auto"
        cascade = Cascade.load(folder, memory=memory, log_prompts=self.detail is Detail.FULL)
        logger.info(
            "Loaded %s from %s, %.2f GB, onto %s as %s, %s, in %.1f s.",
            opened.name,
            folder,
            size_of(opened) / 1e9,
            cascade.device,
            str(cascade.prior.dtype).removeprefix("torch."),
            cascade.home.description,
            time.perf_counter() - start,
        )
        self.origin = Origin.of(cascade, opened)
        self.watch = Stopwatch(cascade.device)
        conditioner = cascade.conditioner
        conditioner.encode_text = self.watch.after(conditioner.encode_text, "text")
        for network in (conditioner.image_encoder, cascade.effnet, *cascade.controlnets.values()):
            if network is not None:
                network.register_forward_hook(lambda *_: self.watch.lap("input_images"))
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        self.model_thread = ThreadPoolExecutor(1, "model")
        time.sleep(LAST_LINES)
        self.cascade = cascade

    def healthcheck(self) -> bool:
        """Whether predictions can work: the model is loaded, the GPU answers, the disk has room. Takes microseconds.

        Raises:
            RuntimeError: the GPU was lost; the message is CUDA's.
        """
        if self.cascade is None:
            return False
        if self.cascade.device.type == "cuda":
            torch.cuda.current_stream(self.cascade.device).query()  # does not wait for it
        return shutil.disk_usage(tempfile.gettempdir()).free > DISK_NEEDED

    def run(
        self,
        prompt: str = Input(
            description="What the picture shows. Any text, or none; only its first 75 tokens are used.",
            default="a red apple on a green background",
        ),
        negative_prompt: str = Input(
            description="What the picture should not show. Only its first 75 tokens are used; ignored without guidance above 1.",
            default="",
        ),
        width: int | None = Input(
            description="Width in pixels, 64 to 2048. Default: from aspect_ratio, or from image.",
            default=None,
            ge=64,
            le=2048,
        ),
        height: int | None = Input(
            description="Height in pixels, 64 to 2048. Default: from aspect_ratio, or from image.",
            default=None,
            ge=64,
            le=2048,
        ),
        num_images: int = Input(
            description="Number of pictures, 1 to 4. The seed is increased by one for each.",
            default=1,
            ge=1,
            le=4,
        ),
        steps_prior: int | None = Input(
            description="Steps of Stage C, which composes the picture, 1 to 50. Default: the model's own, usually 20.",
            default=None,
            ge=1,
            le=50,
        ),
        steps_decoder: int | None = Input(
            description="Steps of Stage B, which adds detail, 1 to 50. Default: the model's own, usually 10.",
            default=None,
            ge=1,
            le=50,
        ),
        guidance_scale_prior: float | None = Input(
            description="Guidance scale of Stage C, 0 to 20. 1 or less turns guidance off, which is twice as fast; default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        guidance_scale_decoder: float | None = Input(
            description="Guidance scale of Stage B, 0 to 20. 1 or less turns guidance off, which is twice as fast; default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        seed: int | None = Input(
            description="Any whole number, taken modulo 4294967296. Default: a random one, reported in metrics.seeds.",
            default=None,
        ),
        aspect_ratio: str = Input(
            description="Ratio of width to height. Ignored with image; width and height override it.",
            default="1:1",
            choices=RATIOS,
        ),
        output_format: str = Input(
            description="File format: webp, jpg or png. png is lossless.", default="webp", choices=FORMATS
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg files, 0 (smallest) to 100 (best). Ignored for png.",
            default=80,
            ge=0,
            le=100,
        ),
        disable_safety_checker: bool = Input(
            description="true: return pictures that the safety checker flags, too. false: drop them.", default=False
        ),
        image_prompts: list[Path] | None = Input(
            description="1 to 4 images that show what the picture shows, used beside the prompt. Default: the prompt alone.",
            default=None,
        ),
        image_prompt_strength: float = Input(
            description="Strength of image_prompts, 0 (none) to 2. The model was trained with 1.",
            default=1.0,
            ge=0,
            le=2,
        ),
        image_prompt_strengths: list[float] | None = Input(
            description="Strength of each of image_prompts, 0 to 2. Default: image_prompt_strength for all.",
            default=None,
        ),
        image: Path | None = Input(
            description="Image to start from, instead of noise: for image-to-image, inpainting, outpainting and upscaling.",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much of image is changed, 0 (only redrawn) to 1 (all of it). Ignored without image.",
            default=0.8,
            ge=0,
            le=1,
        ),
        mask: Path | None = Input(
            description="White where image is repainted, of image's shape; or alpha: repaint image where it is transparent.",
            default=None,
        ),
        outpaint: list[int] | None = Input(
            description="Pixels to add to image and paint, 0 to 2048: four numbers, for left, top, right and bottom.",
            default=None,
        ),
        upscale: bool = Input(
            description="true: redraw image at twice its size, at most 2048. Needs the super_resolution ControlNet.",
            default=False,
        ),
        control_images: list[Path] | None = Input(
            description="1 to 4 images for ControlNets. Each is scaled and cropped to the picture's size.", default=None
        ),
        control_types: list[str] | None = Input(
            description="canny, inpainting or super_resolution. One for all control_images, or one each. Default: canny.",
            default=None,
        ),
        control_scales: list[float] | None = Input(
            description="Strength of the ControlNet, 0 (none) to 2. One for all control_images, or one each. Default: 1.",
            default=None,
        ),
        control_starts: list[float] | None = Input(
            description="Fraction of Stage C's steps at which a ControlNet starts, 0 to 1: one for all, or one each. Default: 0.",
            default=None,
        ),
        control_ends: list[float] | None = Input(
            description="Fraction of Stage C's steps at which a ControlNet ends, 0 to 1: one for all, or one each. Default: 1.",
            default=None,
        ),
        previews: bool = Input(
            description="true: metrics.previews shows small pictures after each step of Stage C. Needs the previewer.",
            default=False,
        ),
    ) -> list[Path]:
        """Make the pictures. They are deleted when the next run starts: Cog has sent them by then.

        Raises:
            ValueError: an input is out of range or no picture, the model lacks what reads pictures, the GPU's memory
                does not suffice, or every picture was flagged.
        """
        given = dict(locals())
        self.outputs.cleanup()
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        with downloaded(check_inputs(given)) as inputs:
            request = request_from(inputs, self.cascade)
            files = {name: inputs[name] for name in PICTURES}
            record = Record.of(request, given | files, self.origin, hashed=self.detail is Detail.FULL)
        ending, quality = inputs["output_format"], inputs["output_quality"]
        safety = None if disable_safety_checker else self.safety

        try:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._make(request, record, ending, quality, safety, previews)
            # Only here are the error, and all that its traceback kept in memory, gone.
            raise ValueError(self._what_would_fit(request))
        except BaseException as error:  # Cog cancels by one that is no Exception
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                logger.exception("The prediction failed.")  # Cog shows the message alone
            error.__traceback__ = None  # through which frames, and so tensors, would stay alive
            self.outputs.cleanup()
            if self.cascade.device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _make(
        self,
        request: Request,
        record: Record,
        ending: str,
        quality: int,
        safety: SafetyChecker | None,
        previews: bool,
    ) -> list[Path]:
        seeds = seeds_of(request)
        logger.info("Seeds: %s", ", ".join(map(str, seeds)))
        self.record_metric("seeds", seeds)
        self.watch.restart()
        reset_peak_memory(self.cascade.device)

        kept: dict[int, Path] = {}
        steps = self._with_previews(self._steps(request), safety) if previews else self._steps(request)
        images = (progress.image for progress in steps if progress.image is not None)
        for index, image in enumerate(images):
            if safety is not None:
                flagged = self.model_thread.submit(safety.flags, image).result()
                self.watch.lap("safety")
                if flagged:
                    logger.warning("Picture %d (seed %d) was flagged by the safety checker.", index, seeds[index])
                    continue
            kept[index] = Path(self.outputs.name) / f"out-{index}.{ending}"
            said = metadata(record.of_picture(index, seeds[index], *image.size), self.detail)
            save_picture(image, kept[index], said, quality)
            self.watch.lap("encoding")

        self.record_metric("flagged", request.num_images - len(kept))
        if not kept:
            raise ValueError(
                "The safety checker flagged every picture, so none is returned; another prompt or seed may help."
            )
        self.record_metric("seeds", [seeds[index] for index in kept])
        self.record_metric("pixels", len(kept) * request.width * request.height)
        self.record_metric("peak_memory_gb", round(peak_memory(self.cascade.device) / 1e9, 3))
        for name, seconds in self.watch.seconds.items():
            self.record_metric(f"seconds.{name}", round(seconds, 4))
        return list(kept.values())

    def _steps(self, request: Request) -> Iterator[Progress]:
        """The work, shown and timed."""
        # Lines are for Replicate, which finds the progress in those that begin with a percentage.
        bar_class = tqdm if sys.stderr.isatty() else ProgressLines
        with bar_class(unit="step", mininterval=0, delay=1e-6) as bar:  # the total is known after the first step
            for part in parts_of(request):
                before = bar.n
                for progress in iterate_on(self.model_thread, self.cascade.steps(part)):
                    self.watch.lap("prior" if progress.stage == "prior" else "decoder")
                    bar.total = before + progress.total
                    bar.set_postfix_str(progress.stage, refresh=False)
                    bar.update()
                    yield progress

    def _with_previews(self, steps: Iterator[Progress], safety: SafetyChecker | None) -> Iterator[Progress]:
        """The work; after each step of Stage C the metric ``previews`` has small pictures of it, as data URLs.

        A metric, because whoever asks for the prediction while it runs, and every webhook, gets the latest value alone;
        of the log, they would get all that was ever written. Server-sent events Cog has for iterators of outputs only.
        """
        for progress in steps:
            if progress.stage == "prior":
                shown = self.model_thread.submit(self.cascade.preview, progress.latents).result()
                if safety is not None:
                    shown = [image for image in shown if not self.model_thread.submit(safety.flags, image).result()]
                self.record_metric("previews", [as_data_url(image) for image in shown])
                self.watch.lap("previews")
            yield progress
        self.record_metric("previews", [])  # the pictures have taken their place

    def _what_would_fit(self, request: Request) -> str:
        """One sentence about a request of which one picture exceeds the GPU's memory. What it says would fit has been tried."""
        asked = f"A picture of {request.width}x{request.height} needs more memory than the GPU has left"
        smaller = request
        for smaller in smaller_requests(request):
            with contextlib.suppress(torch.OutOfMemoryError):
                steps = self.cascade.steps(replace(smaller, steps_prior=1, steps_decoder=1))
                for _ in iterate_on(self.model_thread, steps):
                    pass
                return f"{asked}; one of {smaller.width}x{smaller.height} would fit."
        return f"{asked}, and so does one of {smaller.width}x{smaller.height}: something else must be using it."


def find_weights() -> FilePath:
    """The folder named by CASCADE_WEIGHTS, else the published model if it was downloaded, else the miniature."""
    if os.environ.get("CASCADE_WEIGHTS"):
        return FilePath(os.environ["CASCADE_WEIGHTS"])
    published = WEIGHTS / "stable-cascade"
    return published if published.is_dir() else WEIGHTS / "mini"


def load_safety_checker(model_folder: FilePath, device: torch.device) -> SafetyChecker | None:
    """The safety checker in a model folder or beside it; says what there is."""
    folder = find_safety_checker(model_folder)
    if folder is None:
        logger.warning("There is no safety_checker in %s or beside it: no picture will be checked.", model_folder)
        return None
    start = time.perf_counter()
    checker = SafetyChecker.load(folder, device)
    logger.info("Loaded the safety checker from %s in %.1f s.", folder, time.perf_counter() - start)
    return checker


def size_of(opened: ModelFolder) -> int:
    """The bytes of all components' files."""
    files = (file for part in opened.parts.values() for file in ([part] if part.is_file() else part.rglob("*")))
    return sum(file.stat().st_size for file in files if file.is_file())


def as_data_url(image: Image.Image) -> str:
    """A picture as the data URL of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=PREVIEW_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


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

    def after(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, with a lap after each call."""

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.lap(name)
            return result

        return timed

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


class ProgressLines(tqdm):
    """tqdm for a log: a line for every state, instead of one line that is overwritten."""

    @staticmethod
    def status_printer(file: typing.TextIO) -> Callable[[str], None]:
        def write(state: str) -> None:
            file.write(f"{state}\n")
            file.flush()

        return write


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors since the reset, else those of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
