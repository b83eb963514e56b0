"""The Predictor that Cog serves. Knows Cog: inputs, files, logs, metrics, cancellation; leaves pictures to ``cascade``.

Cog's schema generator reads this file without running it: what stands in an ``Input()`` is a literal or a constant of
this file, a description is one literal, and an input that may be left out is ``| None`` with the default None.
"""

import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from cog import BaseRunner, Input, Path
from PIL import Image
from torch import Tensor

from cascade.cascade import Cascade, Progress
from cascade.images.metadata import save_picture
from cascade.request import Request, smaller_requests
from cascade.running.device import SettingError, choose_device
from cascade.running.errors import is_lost, is_out_of_memory
from cascade.safety import SafetyChecker, find_safety_checker
from cascade.weights import ModelFolder
from serving.cog_files import takes_urls
from serving.image_urls import UrlSettings, downloaded
from serving.inputs import PICTURES, check_inputs, parts_of, request_from, seeds_of
from serving.metadata import Detail, metadata
from serving.progress import Stopwatch, iterate_on, shown, timed, with_previews
from serving.record import Origin, Record

logger = logging.getLogger(__name__)

WEIGHTS = FilePath(__file__).parent / "weights"
RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
FORMATS = ["webp", "jpg", "png"]
# Seconds. What is logged just before setup ends, Cog may lose: on a busy machine, the last line in one start of six.
LAST_LINES = 0.2
# Four pictures of the largest size, as PNG, and some.
DISK_NEEDED = 200_000_000


class Predictor(BaseRunner):
    """Text and images to images."""

    cascade: Cascade | None = None
    gpu_is_lost = False
    urls = UrlSettings()

    def setup(self) -> None:
        """Load the safety checker and the model, onto the GPU if there is one. Fetches nothing.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: an environment variable has a value that is not allowed: CASCADE_DEVICE, CASCADE_DTYPE,
                CASCADE_MEMORY, CASCADE_METADATA, or one of those for image URLs.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.detail = Detail.from_environment()
        self.urls = UrlSettings.from_environment()
        self.run = takes_urls(types.MethodType(Predictor.run, self))
        folder = find_weights()
        opened = ModelFolder.open(folder)
        wanted = {name: os.environ.get(f"CASCADE_{name.upper()}") or "auto" for name in ("device", "dtype", "memory")}
        try:
            device, _, _ = choose_device(wanted["device"], wanted["dtype"])
            # First, so that the model knows how much memory is left.
            self.safety = load_safety_checker(folder, device)
            start = time.perf_counter()
            cascade = Cascade.load(folder, **wanted, log_prompts=self.detail is Detail.FULL)
        except SettingError as error:
            raise ValueError(f"CASCADE_{error.name.upper()} {error.problem}") from None
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
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        self.model_thread = ThreadPoolExecutor(1, "model")
        time.sleep(LAST_LINES)
        self.cascade = cascade

    def healthcheck(self) -> bool:
        """Whether predictions can work: the model is loaded, the GPU answers, the disk has room. Takes microseconds.

        Once the GPU has been lost, which only another process can mend, it stays False.
        """
        if self.cascade is None or self.gpu_is_lost:
            return False
        if self.cascade.device.type == "cuda":
            try:
                torch.cuda.current_stream(self.cascade.device).query()  # does not wait for it
            except RuntimeError:
                self._look_after_gpu()
        return not self.gpu_is_lost and shutil.disk_usage(tempfile.gettempdir()).free > DISK_NEEDED

    def _look_after_gpu(self) -> None:
        """Find out whether the GPU can still be used, after an error; free the memory that nothing holds."""
        if self.cascade.device.type != "cuda" or self.gpu_is_lost:
            return
        if is_lost(self.cascade.device):
            self.gpu_is_lost = True
            logger.error("The GPU can't be used by this process any more: the health check fails from now on.")
        else:
            torch.cuda.empty_cache()

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
        with downloaded(check_inputs(given), PICTURES, self.urls) as inputs:
            request = request_from(inputs, self.cascade)
            files = {name: inputs[name] for name in PICTURES}
            record = Record.of(request, given | files, self.origin, hashed=self.detail is Detail.FULL)
            return self._run(request, record, inputs)

    def _run(self, request: Request, record: Record, inputs: Mapping[str, Any]) -> list[Path]:
        """`_make`, and what has to be done when it fails."""
        ending, quality = inputs["output_format"], inputs["output_quality"]
        safety = None if inputs["disable_safety_checker"] else self.safety
        try:
            try:
                return self._make(request, record, ending, quality, safety, inputs["previews"])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Only here are the error, and all that its traceback kept in memory, gone.
            raise ValueError(self._what_would_fit(request))
        except BaseException as error:  # Cog cancels by one that is no Exception
            if isinstance(error, Exception) and not isinstance(error, ValueError):
                logger.exception("The prediction failed.")  # Cog shows the message alone
            error.__traceback__ = None  # through which frames, and so tensors, would stay alive
            self.outputs.cleanup()
            self._look_after_gpu()
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
        if previews:
            self.cascade.check_previewer()
        seeds = seeds_of(request)
        logger.info("Seeds: %s", ", ".join(map(str, seeds)))
        self.record_metric("seeds", seeds)
        self.watch.restart()
        reset_peak_memory(self.cascade.device)

        kept: dict[int, Path] = {}
        steps = self._steps(request)
        if previews:
            steps = with_previews(
                steps, lambda latents: self._preview(latents, safety), partial(self.record_metric, "previews")
            )
        images = (progress.image for progress in steps if progress.image is not None)
        for index, image in enumerate(images):
            if safety is not None:
                flagged = self._flags(safety, image)
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
        parts = (iterate_on(self.model_thread, self.cascade.steps(part)) for part in parts_of(request))
        return timed(shown(parts), self.watch)

    def _preview(self, latents: Tensor, safety: SafetyChecker | None) -> list[Image.Image]:
        """Small pictures of Stage C's latents, but for those that the safety checker flags.

        They go into a metric, because whoever asks for the prediction while it runs, and every webhook, gets the latest
        value alone; of the log, they would get all that was ever written. Server-sent events Cog has for iterators of
        outputs only.
        """
        images = self.model_thread.submit(self.cascade.preview, latents).result()
        images = [image for image in images if safety is None or not self._flags(safety, image)]
        self.watch.lap("previews")
        return images

    def _flags(self, safety: SafetyChecker, image: Image.Image) -> bool:
        return self.model_thread.submit(self.cascade.with_room, partial(safety.flags, image)).result()

    def _what_would_fit(self, request: Request) -> str:
        """One sentence about a request of which one picture exceeds the GPU's memory. What it says would fit has been tried."""
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


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors since the reset, else those of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
