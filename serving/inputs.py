"""Turns the inputs of `Predictor.run`, from HTTP or the command line, into a `Request`.

`check_inputs` makes all checks that need no picture and no model; `request_from` reads the pictures.
"""

import difflib
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cascade import sizes
from cascade.guides.controls import Control, check_span
from cascade.guides.inpainting import check_canvas, check_shape, extend
from cascade.images.reading import image_prompt_size, read_picture
from cascade.limits import ALPHA, LIMITS, MOST_IMAGES, InputError, counted, need, shown
from cascade.pipeline import Cascade
from cascade.request import (
    ONE_EACH,
    Request,
    check_enlarged,
    check_kind,
    check_masked,
    check_one_each,
    check_prompt_weights,
    upscaling,
)

SEEDS = 2**32
# Inputs that a `Request` has under the same name, except pictures and sizes.
AS_GIVEN = tuple(
    field.name
    for field in fields(Request)
    if field.name in LIMITS and LIMITS[field.name].kind is not Image.Image and field.name not in ("width", "height")
)
# Inputs that have one value for all elements of another input, or one each.
ONE_FOR_ALL = {"image_prompt_strengths": "image_prompts", "lora_scales": "lora_weights"}
PICTURES = tuple(name for name, limits in LIMITS.items() if limits.kind is Image.Image)
URL = re.compile("(https?|data):", re.IGNORECASE)
FILE = "it must be an http, https or data URL of a picture"


def check_inputs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check all inputs, and convert them to the kinds in `LIMITS`.

    Cog's checks do not suffice. Its server accepts 20.0 and 1e23 as whole numbers and 1 as a number, and any text as a
    file, and passes them on unchanged. Without a schema, it accepts everything.

    Args:
        given: values by name. A missing input gets its default; a name that is not an input is ignored.

    Returns:
        All inputs by name. Lists are tuples; those that may have one value for all have one for each.

    Raises:
        InputError: a value is not allowed, or does not fit another input.
    """
    inputs = {
        name: limits.check(name, given.get(name, limits.default), check_picture if name in PICTURES else None)
        for name, limits in LIMITS.items()
    }
    for name in ("mask", "outpaint", "upscale"):
        need(name, inputs[name], "image", inputs["image"])
    if inputs["upscale"]:
        check_upscale(inputs)
    for name, images in ONE_EACH.items():
        if name in inputs and name not in ONE_FOR_ALL:
            check_one_each(name, inputs[name], images, inputs[images])
    if inputs["prompt_weighting"]:
        check_prompt_weights(inputs["prompt"], inputs["negative_prompt"])
    for name, of in ONE_FOR_ALL.items():
        inputs[name] = one_each(name, inputs[name], (1.0,), len(inputs[of]), of)
    return inputs | control_inputs(inputs)


def request_from(inputs: Mapping[str, Any], cascade: Cascade) -> Request:
    """The request that the inputs describe, with its size, its settings and a seed.

    Args:
        inputs: from `check_inputs`, with URLs replaced by files (`image_urls.downloaded`).
        cascade: the model, which has the defaults for inputs that are left out.

    Raises:
        InputError: a file is not a picture, or a picture does not fit the other inputs.
    """
    image, mask = read_image_and_mask(inputs, cascade.native_size)
    size = size_of_pictures(inputs, image, cascade.native_size)
    asked = {name: inputs[name] for name in AS_GIVEN} | {
        "seed": either(inputs["seed"], secrets.randbelow(SEEDS)) % SEEDS,
        "image_prompts": read_list("image_prompts", inputs["image_prompts"], image_prompt_size),
        **read_references(inputs),
        "controls": read_controls(inputs, size),
    }
    if inputs["upscale"]:
        asked["guidance_scale_prior"] = either(asked["guidance_scale_prior"], 1.0)
        return cascade.planner.resolved(upscaling(image, **asked))
    return cascade.planner.resolved(Request(image=image, mask=mask, width=size[0], height=size[1], **asked))


def parts_of(request: Request) -> list[Request]:
    """The request, split in two if its seeds exceed 32 bits: they continue from 0, so that each can be requested."""
    below = min(request.num_images, SEEDS - request.seed)
    above = request.num_images - below
    parts = [replace(request, num_images=below)]
    return [*parts, replace(request, seed=0, num_images=above)] if above else parts


def seeds_of(request: Request) -> list[int]:
    """The seed of each picture."""
    return [part.seed + i for part in parts_of(request) for i in range(part.num_images)]


# ---- what goes with what ----


def check_upscale(inputs: Mapping[str, Any]) -> None:
    """Check that no input contradicts upscale.

    Raises:
        InputError: an input does.
    """
    others = [name for name in ("mask", "outpaint", "width", "height") if inputs[name]]
    if others:
        raise InputError(f"upscale redraws all of image at twice its size; leave out {', '.join(others)}.")
    if len(inputs["control_images"]) == MOST_IMAGES:
        raise InputError(
            f"control_images has {counted(MOST_IMAGES, 'image')}; with upscale, which adds one, it may have at most "
            f"{MOST_IMAGES - 1}."
        )


def control_inputs(inputs: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The inputs that describe controls, with one element for each of control_images.

    Raises:
        InputError: a list has the wrong length, a control needs a mask, or one ends before it starts.
    """
    count = len(inputs["control_images"])
    defaults = {
        "control_types": ("canny",),
        "control_scales": (Control.scale,),
        "control_ranges": (Control.start, Control.end),
    }
    columns = {name: one_each(name, inputs[name], default, count) for name, default in defaults.items()}
    masked = inputs["mask"] or inputs["outpaint"] or None
    for place, kind in enumerate(columns["control_types"]):
        check_kind(place_of("control_types", inputs["control_types"], place), kind, "mask or outpaint", masked)
    for place, (start, end) in enumerate(pairs(inputs["control_ranges"])):
        check_span(f"control_ranges[{2 * place}]", start, f"control_ranges[{2 * place + 1}]", end)
    return columns


def one_each(
    name: str, values: Sequence[Any], default: tuple[Any, ...], count: int, of: str = "control_images"
) -> tuple[Any, ...]:
    """The values for each of `count` elements of another input. Those for one element are used for all, and `default` for none.

    Args:
        default: the values for one element: one, or a pair.

    Raises:
        InputError: there are values for neither 0, 1 nor `count` elements.
    """
    need(name, values, of, count)
    one, every = len(default), len(default) * count
    if len(values) not in (0, one, every):
        allowed = f"{one}" if count == 1 else f"{one}, or {every}"
        number = {1: "one", 2: "two"}[one]
        raise InputError(
            f"{name} has {counted(len(values), 'value')}; it must have {allowed}, {number} for each of {of}."
        )
    return tuple(values) if values and len(values) == every else tuple(values or default) * count


def pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    """Numbers as pairs: the first with the second, the third with the fourth."""
    return list(zip(values[::2], values[1::2], strict=True))


def similar_inputs(name: str) -> str:
    """A question whether an input with a similar name was meant, for a name that is not an input; "" if none is similar."""
    similar = difflib.get_close_matches(name, LIMITS)
    return f"did you mean {' or '.join(similar)}?" if similar else ""


def place_of(name: str, values: Sequence[Any], place: int) -> str:
    """The name of a control's value in errors: with its place in the list, if the caller gave a list."""
    return f"{name}[{min(place, len(values) - 1)}]" if values else name


# ---- pictures ----


def check_picture(name: str, value: Any) -> Any:
    """Check that a value is a file, a URL, or "alpha" as the mask.

    Cog also passes on other texts. They could name files on this machine, so they are refused.

    Raises:
        InputError: the value is something else.
    """
    words = LIMITS[name].choices if name in LIMITS else ()
    if isinstance(value, Path) or (isinstance(value, str) and (value in words or URL.match(value))):
        return value
    raise InputError(f"{name} is {shown(value)}; {' or '.join((FILE, *map(repr, words)))}.")


def file_named(name: str, text: str, folder: Path = Path()) -> Path:
    """The file that an input's text names, as FILE or @FILE; ~ is the user's folder.

    Args:
        folder: where relative paths begin.

    Raises:
        InputError: there is no such file, or the text is a URL with an @ before it.
    """
    if text.startswith("@") and URL.match(text[1:]):
        raise InputError(f"{name} is {shown(text)}; a URL has no @ before it.")
    file = folder / os.path.expanduser(text.removeprefix("@"))
    if not os.path.isfile(file):  # pathlib's raises an error for a name that is too long
        raise InputError(f"{name} is {shown(text)}; there is no file {shown(str(file))}.")
    return file


def read_image_and_mask(inputs: Mapping[str, Any], native: int) -> tuple[Image.Image | None, Image.Image | str | None]:
    """`image` and `mask`: on a larger canvas with `outpaint`; without mask and outpaint, in the size of the pictures.

    Args:
        native: side of the model's native size in pixels, see `sizes.fitted_size`.

    Raises:
        InputError: see `request_from`.
    """
    image, mask = inputs["image"], inputs["mask"]
    if image is None:
        return None, None
    needed = partial(size_of_image, inputs, native)
    image = read_one("image", image, background=None if mask == ALPHA else "white", needed=needed)
    if mask not in (None, ALPHA):
        mask = read_one("mask", mask, needed=partial(size_of_mask, image.size), mask=True)
    return extend(image, mask, *inputs["outpaint"]) if inputs["outpaint"] else (image, mask)


def size_of_image(inputs: Mapping[str, Any], native: int, width: int, height: int) -> tuple[int, int]:
    """The (width, height) to which an image of `width` x `height` is scaled while it is read.

    Raises:
        InputError: the image must keep its size, and that size is not allowed, or not the one that is asked for.
    """
    if inputs["upscale"]:
        check_enlarged(width, height)
    elif inputs["outpaint"]:
        left, above, right, below = check_canvas((width, height), *inputs["outpaint"])
        canvas = (left + width + right, above + height + below)
        check_masked(canvas, inputs["width"], inputs["height"], by="outpaint")
    elif inputs["mask"] is not None:
        check_masked((width, height), inputs["width"], inputs["height"])
    else:
        return sizes.fitted_size(height, width, native, inputs["height"], inputs["width"])[::-1]
    return width, height


def size_of_mask(image: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The (width, height) to which a mask of `width` x `height` is resized: the image's.

    Raises:
        InputError: the mask has another shape than the image.
    """
    check_shape((width, height), *image)
    return image


def size_of_pictures(inputs: Mapping[str, Any], image: Image.Image | None, native: int) -> tuple[int, int]:
    """(width, height) of the pictures to make. `image` is that of `read_image_and_mask`."""
    if image is not None:
        times = 2 if inputs["upscale"] else 1
        return times * image.width, times * image.height
    height, width = sizes.ratio_size(inputs["aspect_ratio"], native)
    return either(inputs["width"], width), either(inputs["height"], height)


def read_controls(inputs: Mapping[str, Any], size: tuple[int, int]) -> tuple[Control, ...]:
    """The controls that four inputs describe.

    Args:
        size: (width, height) of the pictures.

    Raises:
        InputError: a file is not a picture.
    """
    half = tuple(-(-side // 2) for side in size)
    needed = [half if kind == "super_resolution" else size for kind in inputs["control_types"]]
    images = read_list("control_images", inputs["control_images"], *(lambda *_, one=one: one for one in needed))
    columns = (inputs["control_types"], images, inputs["control_scales"], pairs(inputs["control_ranges"]))
    return tuple(Control(kind, one, scale, *span) for kind, one, scale, span in zip(*columns, strict=True))


def read_references(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures among the IP-Adapter's inputs.

    Raises:
        InputError: one is not a picture.
    """
    images, masks = inputs["ip_adapter_images"], inputs["ip_adapter_masks"]
    return {
        "ip_adapter_images": read_list("ip_adapter_images", images, image_prompt_size),
        "ip_adapter_masks": read_list("ip_adapter_masks", masks, grid_mask_size, mask=True),
    }


def grid_mask_size(width: int, height: int) -> tuple[int, int]:
    """The (width, height) in which a mask of the IP-Adapter is needed: its own, or in its shape that of the largest picture."""
    scale = min(1.0, sizes.LARGEST / max(width, height))
    return max(1, round(scale * width)), max(1, round(scale * height))


def read_list(
    name: str, values: Sequence[Path], *needed: Callable[[int, int], tuple[int, int]], **options: Any
) -> tuple[Image.Image, ...]:
    """The pictures of an input that is a list.

    Args:
        needed, options: see `read_picture`; `needed` is one for all, or one each.

    Raises:
        InputError: a file is not a picture.
    """
    needed = needed * len(values) if len(needed) == 1 else needed
    return tuple(
        read_one(f"{name}[{place}]", value, needed=one, **options)
        for place, (value, one) in enumerate(zip(values, needed, strict=True))
    )


def read_one(name: str, file: Path, **options: Any) -> Image.Image:
    """The picture in a file; the options are those of `read_picture`.

    Raises:
        InputError: the file is not a picture.
    """
    try:
        return read_picture(file, name, **options)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def either(value: Any, default: Any) -> Any:
    return default if value is None else value
