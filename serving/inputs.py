"""The inputs of `Predictor.run`, as HTTP and the command line give them, become a `Request`.

`check_inputs` refuses all that can be refused without a picture or a model; `request_from` reads the pictures.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from cascade import sizes
from cascade.cascade import Cascade
from cascade.controls import Control, check_span
from cascade.inpainting import extend
from cascade.limits import ALPHA, LIMITS, MOST_IMAGES, InputError, counted, need, shown
from cascade.pictures import read_picture
from cascade.request import Request, check_kind, check_strengths, upscaling

SEEDS = 2**32
PICTURES = tuple(name for name, limits in LIMITS.items() if limits.kind is Image.Image)
URL = re.compile("(https?|data):", re.IGNORECASE)
FILE = "it must be an http, https or data URL of a picture"


def check_inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """All inputs, in the kinds that `LIMITS` names; lists as tuples, the controls' with an element for each image.

    Cog's server takes 20.0 and 1e23 for whole numbers and 1 for a number, and hands them on as they are, as it does every
    text that is no URL; without a schema it takes all.

    Args:
        given: by name. What is not in it has its default; what is no input is left alone.

    Raises:
        InputError: one is wrong, or does not go with another.
    """
    inputs = {
        name: limits.check(name, given.get(name, limits.default), check_picture if name in PICTURES else None)
        for name, limits in LIMITS.items()
    }
    for name in ("mask", "outpaint", "upscale"):
        need(name, inputs[name], "image", inputs["image"])
    if inputs["upscale"]:
        check_upscale(inputs)
    check_strengths(inputs["image_prompts"], inputs["image_prompt_strengths"])
    return inputs | control_inputs(inputs)


def request_from(inputs: Mapping[str, Any], cascade: Cascade) -> Request:
    """The request that inputs describe, with its size, its settings and a seed.

    Args:
        inputs: of `check_inputs`, with files in the place of URLs (`files.fetch`).
        cascade: the model, which decides what was left out.

    Raises:
        InputError: a picture is none, or does not go with the other inputs.
    """
    image, mask = read_image_and_mask(inputs)
    prompts = read_list("image_prompts", inputs["image_prompts"])
    defaults = cascade.defaults
    asked = {
        "prompt": inputs["prompt"],
        "negative_prompt": inputs["negative_prompt"],
        "num_images": inputs["num_images"],
        "seed": either(inputs["seed"], secrets.randbelow(SEEDS)) % SEEDS,
        "steps_prior": either(inputs["steps_prior"], defaults["prior"].steps),
        "steps_decoder": either(inputs["steps_decoder"], defaults["decoder"].steps),
        "guidance_scale_prior": inputs["guidance_scale_prior"],
        "guidance_scale_decoder": either(inputs["guidance_scale_decoder"], defaults["decoder"].guidance),
        "image_prompts": prompts,
        "image_prompt_strengths": inputs["image_prompt_strengths"] or [inputs["image_prompt_strength"]] * len(prompts),
        "prompt_strength": inputs["prompt_strength"],
        "controls": read_controls(inputs),
    }
    if inputs["upscale"]:
        asked["guidance_scale_prior"] = either(asked["guidance_scale_prior"], 1.0)
        return upscaling(image, **asked)
    asked["guidance_scale_prior"] = either(asked["guidance_scale_prior"], defaults["prior"].guidance)
    if image is not None:
        request = Request(image=image, mask=mask, width=inputs["width"], height=inputs["height"], **asked)
        height, width = cascade.picture_size(request)
        return replace(request, width=width, height=height)
    height, width = sizes.ratio_size(inputs["aspect_ratio"], cascade.native_size)
    return Request(width=either(inputs["width"], width), height=either(inputs["height"], height), **asked)


def parts_of(request: Request) -> list[Request]:
    """The request, cut in two where its seeds leave 32 bits: there they go on from 0, and can all be asked for."""
    below = min(request.num_images, SEEDS - request.seed)
    above = request.num_images - below
    parts = [replace(request, num_images=below)]
    return [*parts, replace(request, seed=0, num_images=above)] if above else parts


def seeds_of(request: Request) -> list[int]:
    """The seed of each picture."""
    return [part.seed + i for part in parts_of(request) for i in range(part.num_images)]


# ---- what goes with what ----


def check_upscale(inputs: Mapping[str, Any]) -> None:
    """Make sure that nothing is asked for that upscaling cannot do.

    Raises:
        InputError: something is.
    """
    others = [name for name in ("mask", "outpaint", "width", "height") if inputs[name]]
    if others:
        raise InputError(f"upscale makes all of image in twice its size; leave out {', '.join(others)}.")
    if len(inputs["control_images"]) == MOST_IMAGES:
        raise InputError(
            f"control_images has {counted(MOST_IMAGES, 'image')}; with upscale, which adds one, it may have at most "
            f"{MOST_IMAGES - 1}."
        )


def control_inputs(inputs: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The inputs that describe controls, with an element for each of control_images.

    Raises:
        InputError: their numbers do not fit, one needs a mask, or one ends before it starts.
    """
    count = len(inputs["control_images"])
    defaults = {"control_types": "canny"}
    defaults |= {f"control_{name}s": getattr(Control, name) for name in ("scale", "start", "end")}
    columns = {name: one_each(name, inputs[name], default, count) for name, default in defaults.items()}
    masked = inputs["mask"] or inputs["outpaint"] or None
    for place in range(count):
        names = {name: place_of(name, inputs[name], place) for name in columns}
        check_kind(names["control_types"], columns["control_types"][place], "mask or outpaint", masked)
        start, end = (columns[name][place] for name in ("control_starts", "control_ends"))
        check_span(names["control_starts"], start, names["control_ends"], end)
    return columns


def one_each(name: str, values: Sequence[Any], default: Any, count: int) -> tuple[Any, ...]:
    """A value for each of so many control_images: of an input with one value, the same for all.

    Raises:
        InputError: the number of values is neither.
    """
    need(name, values, "control_images", count)
    if len(values) not in (0, 1, count):
        raise InputError(
            f"{name} has {counted(len(values), 'value')}; it must have 1, or {count}, one for each of control_images."
        )
    return tuple(values) if len(values) == count else (values[0] if values else default,) * count


def place_of(name: str, values: Sequence[Any], place: int) -> str:
    """What the caller knows a control's value by: its place in the list that was given, if one was."""
    return f"{name}[{min(place, len(values) - 1)}]" if values else name


# ---- pictures ----


def check_picture(name: str, value: Any) -> Any:
    """A file or a URL, or "alpha" as the mask.

    Cog hands on texts that are no URLs; they could name files of this machine, and are not opened.

    Raises:
        InputError: it is neither.
    """
    words = LIMITS[name].choices if name in LIMITS else ()
    if isinstance(value, Path) or (isinstance(value, str) and (value in words or URL.match(value))):
        return value
    raise InputError(f"{name} is {shown(value)}; {' or '.join((FILE, *map(repr, words)))}.")


def read_image_and_mask(inputs: Mapping[str, Any]) -> tuple[Image.Image | None, Image.Image | str | None]:
    """`image` and `mask`, on the larger canvas if `outpaint` asks for one.

    Raises:
        InputError: see `request_from`.
    """
    image, mask = inputs["image"], inputs["mask"]
    if image is None:
        return None, None
    image = read_one("image", image, background=None if mask == ALPHA else "white")
    if mask not in (None, ALPHA):
        mask = read_one("mask", mask, background="black")
    return extend(image, mask, *inputs["outpaint"]) if inputs["outpaint"] else (image, mask)


def read_controls(inputs: Mapping[str, Any]) -> tuple[Control, ...]:
    """The controls that five inputs describe.

    Raises:
        InputError: one is no picture.
    """
    images = read_list("control_images", inputs["control_images"])
    names = ("control_scales", "control_starts", "control_ends")
    columns = zip(inputs["control_types"], images, *(inputs[name] for name in names), strict=True)
    return tuple(Control(*column) for column in columns)


def read_list(name: str, values: Sequence[Path]) -> tuple[Image.Image, ...]:
    """The pictures of an input that is a list.

    Raises:
        InputError: one is no picture.
    """
    return tuple(read_one(f"{name}[{place}]", value) for place, value in enumerate(values))


def read_one(name: str, file: Path, **options: Any) -> Image.Image:
    """The picture of a file; the options are those of `read_picture`.

    Raises:
        InputError: it is none.
    """
    try:
        return read_picture(file, name, **options)
    except ValueError as error:
        raise InputError(str(error)) from error


def either(value: Any, default: Any) -> Any:
    return default if value is None else value
