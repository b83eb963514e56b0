"""The Predictor that Cog serves. Knows Cog: inputs, files, logs, metrics, cancellation; leaves pictures to ``cascade``.

Cog's schema generator reads this file without running it: what stands in an ``Input()`` is a literal or a constant of
this file, a description is one literal, and an input that may be left out is ``| None`` with the default None.
"""

import inspect
import logging
import math
import os
import reprlib
import resource
import secrets
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from cog import BaseRunner, Input, Path
from PIL import Image
from torch import Tensor

from cascade import sizes
from cascade.cascade import Cascade, Progress
from cascade.controls import Control
from cascade.images.metadata import save_picture
from cascade.inpainting import extend
from cascade.networks.controlnet import KINDS
from cascade.pictures import read_picture
from cascade.request import MOST_IMAGES, Request, upscaling
from cascade.running.device import SettingError, choose_device
from cascade.running.errors import is_lost, is_out_of_memory
from cascade.safety import SafetyChecker, find_safety_checker
from cascade.weights import ModelFolder
from serving.metadata import Detail, metadata
from serving.progress import Stopwatch, iterate_on, shown, timed, with_previews
from serving.record import Origin, Record

logger = logging.getLogger(__name__)

WEIGHTS = FilePath(__file__).parent / "weights"
RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
FORMATS = ["webp", "jpg", "png"]
SEEDS = 2**32
# Seconds. What is logged just before setup ends, Cog may lose: on a busy machine, the last line in one start of six.
LAST_LINES = 0.2
# Four pictures of the largest size, as PNG, and some.
DISK_NEEDED = 200_000_000


class Predictor(BaseRunner):
    """Text and images to images."""

    cascade: Cascade | None = None
    gpu_is_lost = False

    def setup(self) -> None:
        """Load the safety checker and the model, onto the GPU if there is one. Fetches nothing.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: CASCADE_DEVICE, CASCADE_DTYPE, CASCADE_MEMORY or CASCADE_METADATA has a value that is not allowed.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.detail = Detail.from_environment()
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
            description="What the picture shows: any text, of which the first 77 tokens count; it may be empty.",
            default="a red apple on a green background",
        ),
        negative_prompt: str = Input(
            description="What it should not show: any text, of which the first 77 tokens count; needs guidance above 1.",
            default="",
        ),
        width: int | None = Input(
            description="Width in pixels, 64 to 2048; left out: that of aspect_ratio.", default=None, ge=64, le=2048
        ),
        height: int | None = Input(
            description="Height in pixels, 64 to 2048; left out: that of aspect_ratio.", default=None, ge=64, le=2048
        ),
        num_images: int = Input(
            description="How many pictures, 1 to 4; each has a seed one higher than the one before.",
            default=1,
            ge=1,
            le=4,
        ),
        steps_prior: int | None = Input(
            description="Steps of Stage C, which composes, 1 to 50; left out: the model's own, usually 20.",
            default=None,
            ge=1,
            le=50,
        ),
        steps_decoder: int | None = Input(
            description="Steps of Stage B, which adds detail, 1 to 50; left out: the model's own, usually 10.",
            default=None,
            ge=1,
            le=50,
        ),
        guidance_scale_prior: float | None = Input(
            description="How closely Stage C keeps to the prompt, 0 to 20; up to 1 not at all; left out: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        guidance_scale_decoder: float | None = Input(
            description="How closely Stage B keeps to the prompt, 0 to 20; up to 1 not at all; left out: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        seed: int | None = Input(
            description="Same seed, same pictures: any whole number, modulo 4294967296; left out: a random one, reported.",
            default=None,
        ),
        aspect_ratio: str = Input(
            description="Width to height, in the area that the model draws best; width, height or image override it.",
            default="1:1",
            choices=RATIOS,
        ),
        output_format: str = Input(
            description="Format of the files: webp, jpg, or png, which loses nothing.", default="webp", choices=FORMATS
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg, 0 (smallest files) to 100 (best pictures); png ignores it.",
            default=80,
            ge=0,
            le=100,
        ),
        disable_safety_checker: bool = Input(
            description="true: return pictures that the safety checker flags; false: drop them.", default=False
        ),
        image_prompts: list[Path] | None = Input(
            description="1 to 4 images that say, beside the prompt, what the picture shows; left out: the prompt alone.",
            default=None,
        ),
        image_prompt_strength: float = Input(
            description="How much the image prompts say, 0 (nothing) to 2; 1 is what the model learned.",
            default=1.0,
            ge=0,
            le=2,
        ),
        image_prompt_strengths: list[float] | None = Input(
            description="The same, a number for each of image_prompts; left out: image_prompt_strength for all.",
            default=None,
        ),
        image: Path | None = Input(
            description="An image to begin with, which is painted over; left out: the picture begins with noise.",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much of image is painted over, 0 (only redrawn) to 1 (all of it); of no matter without image.",
            default=0.8,
            ge=0,
            le=1,
        ),
        mask: Path | None = Input(
            description="An image of image's shape: where it is white, image is repainted; the rest stays to the pixel.",
            default=None,
        ),
        outpaint: list[int] | None = Input(
            description="Pixels to add to image and to paint: four numbers, to the left, above, to the right, below.",
            default=None,
        ),
        upscale: bool = Input(
            description="true: make image anew in twice its size, which may be up to 2048; needs its ControlNet.",
            default=False,
        ),
        control_images: list[Path] | None = Input(
            description="1 to 4 images for ControlNets; each is fitted to the picture's size.", default=None
        ),
        control_types: list[str] | None = Input(
            description="canny, inpainting or super_resolution: one for all control_images or one each; left out: canny.",
            default=None,
        ),
        control_scales: list[float] | None = Input(
            description="How much they count, 0 (not at all) to 2: one for all control_images or one each; left out: 1.",
            default=None,
        ),
        control_starts: list[float] | None = Input(
            description="From which part of Stage C's steps on, 0 to 1: one for all or one each; left out: 0.",
            default=None,
        ),
        control_ends: list[float] | None = Input(
            description="Up to which part of Stage C's steps, 0 to 1: one for all or one each; left out: 1.",
            default=None,
        ),
        previews: bool = Input(
            description="true: the metric previews shows, after each step of Stage C, small pictures of what it has.",
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
        defaults = self.cascade.defaults
        ratio_width, ratio_height = ratio_size(checked("aspect_ratio", aspect_ratio), self.cascade.native_size)
        width, height = checked("width", width), checked("height", height)
        for name, value in {"mask": mask, "outpaint": outpaint, "upscale": upscale}.items():
            if value and image is None:
                raise ValueError(f"{name} needs an image; there is none.")
        if upscale and not all(one is None for one in (mask, outpaint, width, height)):
            raise ValueError(
                "upscale makes all of image anew in twice its size: leave mask, outpaint, width, height out."
            )
        source = None if image is None else read_file("image", image)
        hidden = None if mask is None else read_file("mask", mask, background="black")
        if outpaint is not None:
            source, hidden = extend(source, hidden, *numbers("outpaint", outpaint, 4, int, 0, 2048))
        prompts = read_files("image_prompts", image_prompts)
        strength = checked("image_prompt_strength", image_prompt_strength)
        strengths = either(image_prompt_strengths, [strength] * len(prompts))
        asked = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "num_images": checked("num_images", num_images),
            "seed": either(checked("seed", seed), secrets.randbelow(SEEDS)) % SEEDS,
            "steps_prior": either(checked("steps_prior", steps_prior), defaults["prior"].steps),
            "steps_decoder": either(checked("steps_decoder", steps_decoder), defaults["decoder"].steps),
            "guidance_scale_prior": either(
                checked("guidance_scale_prior", guidance_scale_prior), 1.0 if upscale else defaults["prior"].guidance
            ),
            "guidance_scale_decoder": either(
                checked("guidance_scale_decoder", guidance_scale_decoder), defaults["decoder"].guidance
            ),
            "image_prompts": prompts,
            "image_prompt_strengths": tuple(numbers("image_prompt_strengths", strengths, len(prompts), float, 0, 2)),
            "prompt_strength": checked("prompt_strength", prompt_strength),
            "controls": read_controls(
                control_images, control_types, control_scales, control_starts, control_ends, masked=hidden is not None
            ),
        }
        if upscale:
            request = upscaling(source, **asked)
        elif source is not None:
            request = Request(image=source, mask=hidden, width=width, height=height, **asked)
            height, width = self.cascade.picture_size(request)
            request = replace(request, width=width, height=height)
        else:
            request = Request(width=either(width, ratio_width), height=either(height, ratio_height), **asked)
        ending = checked("output_format", output_format)
        quality = checked("output_quality", output_quality)
        safety = None if disable_safety_checker else self.safety
        record = Record.of(request, given, self.origin, hashed=self.detail is Detail.FULL)

        try:
            try:
                return self._make(request, record, ending, quality, safety, previews)
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


# Taken here because Cog's server puts the bare defaults into the signature before it calls `run`.
INPUTS = inspect.signature(Predictor.run).parameters


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


def checked(name: str, value: Any) -> Any:
    """The value of an input as the kind of number, in the range or among the choices that `Predictor.run` declares.

    Cog's server takes 20.0 and 1e23 for whole numbers, and hands them on as they are; without a schema it takes all.

    Raises:
        ValueError: it is none.
    """
    parameter = INPUTS[name]
    kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
    field = parameter.default
    if value is None and type(None) in kinds:
        return None
    if field.choices is not None:
        if value not in field.choices:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(field.choices)}.")
        return value
    kind = int if int in kinds else float
    is_number = type(value) is int or (type(value) is float and math.isfinite(value))
    if not is_number or kind(value) != value or not either(field.ge, value) <= value <= either(field.le, value):
        word = "whole number" if kind is int else "number"
        limits = "" if field.ge is None else f" from {field.ge} to {field.le}"
        raise ValueError(f"{name} is {value!r}; it must be a {word}{limits}.")
    return kind(value)


def numbers(name: str, values: Any, count: int, kind: type, low: int, high: int) -> list[Any]:
    """The values of an input that is a list of so many numbers, int or float, from `low` to `high`.

    Raises:
        ValueError: there are more or fewer, or one is something else.
    """
    word = "whole numbers" if kind is int else "numbers"
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values; it must have {count}.")
    for value in values:
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        if not is_number or kind(value) != value or not low <= value <= high:
            raise ValueError(f"{name} has {reprlib.repr(value)} in it; it must have {word} from {low} to {high} only.")
    return [kind(value) for value in values]


def one_each(name: str, values: Any, default: Any, count: int) -> list[Any]:
    """A value for each of so many control_images: of an input with one value, the same for all.

    Raises:
        ValueError: the number of values is neither.
    """
    if not values:
        return [default] * count
    if count == 0:
        raise ValueError(f"{name} needs control_images; there are none.")
    if len(values) not in (1, count):
        raise ValueError(f"{name} has {len(values)} values; it must have 1, or one for each of {count} control_images.")
    return values * count if len(values) == 1 else values


def read_controls(images: Any, types: Any, scales: Any, starts: Any, ends: Any, *, masked: bool) -> tuple[Control, ...]:
    """The controls that five inputs describe.

    Args:
        masked: whether there is a mask, which the type "inpainting" needs.

    Raises:
        ValueError: an input has a value that is not allowed, or their numbers do not fit.
    """
    pictures = read_files("control_images", images)
    count = len(pictures)
    types = one_each("control_types", types, "canny", count)
    for kind in types:
        if kind not in KINDS:
            raise ValueError(f"control_types has {reprlib.repr(kind)} in it; it must have {', '.join(KINDS)} only.")
    if "inpainting" in types and not masked:
        raise ValueError("control_types has 'inpainting' in it, which needs mask or outpaint; there is none.")
    columns = [
        numbers(name, one_each(name, values, default, count), count, float, 0, high)
        for name, values, default, high in (
            ("control_scales", scales, 1.0, 2),
            ("control_starts", starts, 0.0, 1),
            ("control_ends", ends, 1.0, 1),
        )
    ]
    return tuple(Control(*control) for control in zip(types, pictures, *columns, strict=True))


def read_file(name: str, file: Any, background: str = "white") -> Image.Image:
    """The picture of a file input; what is transparent in it is laid on the background.

    Cog downloads http(s) and data URLs, and hands on every other text as it is: it could name a file of this machine.

    Raises:
        ValueError: it is no downloaded file, or no picture.
    """
    if not isinstance(file, Path):
        raise ValueError(f"{name} is {reprlib.repr(file)}; it must be an http, https or data URL of a picture.")
    return read_picture(file, name, background)


def read_files(name: str, files: Any) -> tuple[Image.Image, ...]:
    """The pictures of an input of several files.

    Raises:
        ValueError: there are too many, or one is no downloaded file or no picture.
    """
    files = files or []
    if len(files) > MOST_IMAGES:
        raise ValueError(f"{name} has {len(files)} pictures; {MOST_IMAGES} are the limit.")
    # Beside a text that is no URL, Cog downloads none of the others; what is wrong is the text.
    texts = [file for file in files if isinstance(file, str)]
    return tuple(read_file(name, file) for file in texts or files)


def either(value: Any, default: Any) -> Any:
    return default if value is None else value


def ratio_size(ratio: str, native_size: int) -> tuple[int, int]:
    """(width, height) of exactly this ratio, in multiples of 8, with about the area of the native square."""
    columns, rows = map(int, ratio.split(":"))
    shared = math.gcd(columns, rows)
    columns, rows = columns // shared, rows // shared
    unit = native_size / math.sqrt(columns * rows)
    largest = sizes.LARGEST // max(columns, rows) // sizes.MULTIPLE
    unit = sizes.MULTIPLE * min(max(round(unit / sizes.MULTIPLE), 1), largest)
    return columns * unit, rows * unit


def parts_of(request: Request) -> list[Request]:
    """The request, cut in two where its seeds leave 32 bits: there they go on from 0, and can all be asked for."""
    below = min(request.num_images, SEEDS - request.seed)
    above = request.num_images - below
    parts = [replace(request, num_images=below)]
    return [*parts, replace(request, seed=0, num_images=above)] if above else parts


def seeds_of(request: Request) -> list[int]:
    """The seed of each picture."""
    return [part.seed + i for part in parts_of(request) for i in range(part.num_images)]


def smaller_requests(request: Request) -> Iterator[Request]:
    """One picture of half the area that was asked for, of a quarter ..., of the same shape."""
    enlarged = any(control.kind == "super_resolution" for control in request.controls)
    smallest = 2 * sizes.SMALLEST if enlarged else sizes.SMALLEST
    width, height = request.width, request.height
    while max(width, height) > smallest:
        width, height = (
            max(int(side / math.sqrt(2)) // sizes.MULTIPLE * sizes.MULTIPLE, smallest) for side in (width, height)
        )
        # With a mask, pictures have the image's size.
        image = request.image if request.mask is None else request.image.resize((width, height))
        mask = None if request.mask is None else Image.new("L", (width, height), "white")
        yield replace(request, num_images=1, width=width, height=height, image=image, mask=mask)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU those of tensors since the reset, else those of the process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
