"""Masks that are said on the page: painted strokes, a rectangle; and an image laid under its picture for comparison."""

import re
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.guides.inpainting import WHITE, extend
from cascade.images.reading import read_picture
from cascade.images.tensors import fitted
from cascade.limits import InputError, shown


def strokes_of(painted: dict[str, Any] | None) -> Image.Image | None:
    """The mask that was painted, in mode "1": white where the brush was; None if it was nowhere.

    Args:
        painted: the value of a `gr.ImageEditor` of Pillow images in RGBA.
    """
    layers = [layer.getchannel("A") for layer in (painted or {}).get("layers", ()) if layer is not None]
    layers = [alpha for alpha in layers if alpha.getextrema()[1] >= WHITE]
    return layers[0].point(lambda alpha: 255 * (alpha >= WHITE), "1") if layers else None


def rectangle(text: str, image: Path | None) -> Image.Image:
    """The mask of a rectangle, in mode "1" and in the size of its image.

    Args:
        text: four whole numbers: left, top, right, bottom in pixels; right and bottom are outside of it.
        image: the file of the image.

    Raises:
        InputError: the text says no rectangle in the image.
        ValueError: the file is not a picture.
    """
    if image is None:
        raise InputError("mask needs image, which is left out.")
    width, height = read_picture(image, "image").size
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\s*\d+([,;\s]+\d+){3}\s*", text) or not (
        numbers[0] < numbers[2] <= width and numbers[1] < numbers[3] <= height
    ):
        raise InputError(
            f"mask is the rectangle {shown(text)}; it must be left, top, right and bottom in an image of {width}x{height}."
        )
    mask = Image.new("1", (width, height))
    mask.paste(1, tuple(numbers))
    return mask


def before(image: Path, outpaint: list[int] | None, width: int, height: int) -> Image.Image:
    """The image that a picture was made from, RGB, as it lay under it.

    Args:
        image: its file.
        outpaint: the pixels that were added at the left, top, right and bottom; None: none.
        width, height: of the picture.
    """
    found = read_picture(image, "image")
    return fitted(extend(found, None, *outpaint)[0] if outpaint else found, height, width)
