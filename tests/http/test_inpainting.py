"""Masks and larger canvases, as clients send them: what is kept is kept to the pixel, and bad ones get a sentence."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.http.serving import Server, data_url, picture
from tests.http.test_images import BLUE, FEWEST, RED, refusal

INPUTS = {name: value for name, value in FEWEST.items() if name not in ("width", "height")}


def source(size: tuple[int, int] = (100, 75)) -> Image.Image:
    """No two pixels of it are alike, and its size is no multiple of anything."""
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([columns * 2, rows * 3, (columns * 7 + rows * 13) % 256], axis=2).astype(np.uint8))


def right_half(size: tuple[int, int] = (100, 75), mode: str = "L") -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask.convert(mode)


def turned() -> str:
    """A mask that was stored lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return data_url(right_half().transpose(Image.Transpose.ROTATE_90), exif=exif)


def strokes() -> str:
    """White on a transparent ground, which has a colour of its own."""
    mask = Image.new("RGBA", (100, 75), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (50, 0, 100, 75))
    return data_url(mask)


def sixteen_bits() -> str:
    return data_url(Image.fromarray(np.asarray(right_half()).astype(np.uint16) * 257))


def animated() -> str:
    return data_url(right_half(), "GIF", save_all=True, append_images=[Image.new("L", (100, 75), 255)])


@pytest.mark.parametrize(
    "mask",
    [
        data_url(right_half()),
        data_url(right_half(mode="1")),
        data_url(right_half(mode="RGB"), "JPEG", quality=95),
        data_url(right_half(mode="CMYK"), "JPEG", quality=95),
        data_url(right_half(mode="P")),
        data_url(right_half((200, 150))),
        data_url(right_half((50, 38))),
        sixteen_bits(),
        animated(),
        turned(),
        strokes(),
    ],
    ids=["grey", "bits", "jpeg", "cmyk", "palette", "larger", "smaller", "16 bits", "animated", "turned", "alpha"],
)
def test_what_is_not_white_is_kept_to_the_pixel(server: Server, mask: str) -> None:
    image = source()
    made = picture(server.predict(**INPUTS, image=data_url(image), mask=mask)["output"][0])
    assert made.size == (100, 75)
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(image)).max(2)
    assert not difference[:, :50].any()
    assert (difference[:, 60:] > 0).mean() > 0.9


def test_what_is_transparent_is_repainted_if_asked_for(server: Server) -> None:
    image = source()
    hole = image.convert("RGBA")
    hole.putalpha(Image.eval(right_half(), lambda white: 255 - white))
    made = picture(server.predict(**INPUTS, image=data_url(hole), mask="alpha")["output"][0])
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(image)).max(2)
    assert not difference[:, :50].any()
    assert (difference[:, 60:] > 0).mean() > 0.9
    on_white = Image.composite(Image.new("RGB", (100, 75), "white"), image, right_half())
    same = picture(server.predict(**INPUTS, image=data_url(on_white), mask=data_url(right_half()))["output"][0])
    assert made.tobytes() == same.tobytes()
    plain = picture(server.predict(**INPUTS, image=data_url(hole))["output"][0])
    assert plain.tobytes() == picture(server.predict(**INPUTS, image=data_url(on_white))["output"][0]).tobytes()


def test_an_empty_list_is_left_out(server: Server) -> None:
    image = {"image": data_url(source()), "steps_prior": 1}
    both = [server.predict(**{**INPUTS, **image, **empty})["output"] for empty in ({}, {"outpaint": []})]
    assert both[0] == both[1]


def test_what_is_white_becomes_what_the_prompt_says(server: Server) -> None:
    """A red apple into an empty ground."""
    mask = Image.new("L", (256, 256))
    mask.paste(255, (60, 60, 196, 196))
    inputs = {"prompt": "a red apple on a blue background", "seed": 1, "output_format": "png", "prompt_strength": 1}
    inputs |= {"steps_prior": 10, "steps_decoder": 3}
    ground = data_url(Image.new("RGB", (256, 256), BLUE))
    made = np.asarray(picture(server.predict(**inputs, image=ground, mask=data_url(mask))["output"][0]))
    assert (made[np.asarray(mask) == 0] == BLUE).all()
    middle = made[100:156, 100:156].reshape(-1, 3).mean(0)
    assert middle[0] > middle[2] + 60


def test_outpainting(server: Server) -> None:
    image = source()
    prediction = server.predict(**INPUTS, image=data_url(image), outpaint=[20, 0, 9.0, 30])
    made = picture(prediction["output"][0])
    assert made.size == (129, 105)
    assert made.crop((20, 0, 120, 75)).tobytes() == image.tobytes()
    assert prediction["metrics"]["pixels"] == 129 * 105
    masked = {"mask": data_url(right_half()), "outpaint": [20, 0, 9, 30]}
    both = picture(server.predict(**INPUTS, image=data_url(image), **masked)["output"][0])
    assert both.crop((20, 0, 70, 75)).tobytes() == image.crop((0, 0, 50, 75)).tobytes()
    assert both.crop((70, 0, 120, 75)).tobytes() != image.crop((50, 0, 100, 75)).tobytes()


IMAGE = data_url(Image.new("RGB", (80, 72), RED))
WHITE = data_url(Image.new("L", (80, 72), 255))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"mask": WHITE}, "mask needs image, which is left out."),
        ({"outpaint": [8, 8, 8, 8]}, "outpaint needs image, which is left out."),
        (
            {"image": IMAGE, "mask": data_url(Image.new("L", (80, 72)))},
            "mask has no white, so nothing of image would be repainted.",
        ),
        (
            {"image": IMAGE, "mask": data_url(Image.new("L", (80, 40), 255))},
            "mask has 80x40 pixels, and image 80x72; it must have the image's shape.",
        ),
        (
            {"image": data_url(Image.new("RGB", (1, 1))), "mask": data_url(Image.new("L", (1, 1), 255))},
            "image with a mask has 1x1 pixels, and pictures have its size; each side must have 64 to 4096.",
        ),
        (
            {"image": data_url(Image.new("RGB", (4104, 80))), "mask": data_url(Image.new("L", (4104, 80), 255))},
            "image with a mask has 4104x80 pixels, and pictures have its size; each side must have 64 to 4096.",
        ),
        (
            {"image": IMAGE, "mask": WHITE, "width": 64, "height": 72},
            "width is 64, but image with a mask has 80x72 pixels, and pictures have its size.",
        ),
        ({"image": IMAGE, "outpaint": [8, 8]}, "outpaint has 2 values; it must have 4."),
        (
            {"image": IMAGE, "outpaint": [8, 8, 8, 1.0e10]},
            "outpaint[3] is 10000000000.0; it must be a whole number from 0 to 4096.",
        ),
        (
            {"image": IMAGE, "outpaint": [8, 8, 8, -8]},
            "outpaint[3] is -8; it must be a whole number from 0 to 4096.",
        ),
        (
            {"image": IMAGE, "outpaint": [0, 0, 0, 0]},
            "outpaint is 0, 0, 0, 0; one of its numbers must be above 0.",
        ),
        (
            {"image": IMAGE, "mask": "alpha"},
            "mask is 'alpha', which needs a transparent region in image; there is none.",
        ),
        (
            {"image": IMAGE, "outpaint": [0, 0, 4028, 0]},
            "outpaint is 0, 0, 4028, 0, which makes 4108x72 pixels of image's 80x72; each side may have 4096.",
        ),
    ],
)
def test_bad_masks_and_canvases_get_one_sentence(server: Server, inputs: dict[str, Any], sentence: str) -> None:
    assert refusal(server, **{"width": None, "height": None, **inputs}).startswith(sentence)
