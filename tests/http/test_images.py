"""Images as inputs, as clients send them: data and http URLs of every kind of picture, and what is none."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade.limits import shown
from tests.http.serving import SLOW, SMALL, Server, data_url, picture
from tests.images.files import png_of

# Small enough to be quick, with enough steps for colours.
QUICK = {
    "prompt": "",
    "width": 128,
    "height": 128,
    "steps_prior": 4,
    "steps_decoder": 3,
    "output_format": "png",
    "seed": 1,
}
# For pictures that are only compared: with a ControlNet's half of the steps, one is left.
FEWEST = {**QUICK, "steps_prior": 2, "steps_decoder": 1}
RED, BLUE = (200, 30, 30), (30, 30, 200)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    image = Image.new("RGB", (256, 256), RED)
    image.paste(BLUE, (0, 128, 256, 256))
    return image.convert(mode)


def turned() -> str:
    """Stored lying on its side, as a camera does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return data_url(halves().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)


def with_alpha() -> str:
    """What is transparent looks blue to whoever forgets that it is not to be seen: it is white."""
    image = halves("RGBA")
    image.paste((*BLUE, 0), (0, 128, 256, 256))
    return data_url(image)


def animated() -> str:
    return data_url(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (256, 256), "white")] * 2)


def sixteen_bits() -> str:
    pixels = np.zeros((256, 256), np.uint16)
    pixels[:128] = 65535
    return data_url(Image.fromarray(pixels))


def redrawn(server: Server, url: str, **inputs: Any) -> np.ndarray:
    """The mean colours of the upper and the lower half of what becomes of an image that is only redrawn."""
    prediction = server.predict(**{**QUICK, "image": url, "prompt_strength": 0, **inputs})
    pixels = np.asarray(picture(prediction["output"][0])).astype(int)
    return np.stack([half.mean((0, 1)) for half in np.split(pixels, 2)])


def made(server: Server, **inputs: Any) -> bytes:
    """The pixels of a quick picture."""
    return picture(server.predict(**{**FEWEST, **inputs})["output"][0]).tobytes()


def refusal(server: Server, **inputs: Any) -> str:
    """What the failure of a request says; the next one works. An input that is None is left out."""
    answer = server.post_when_ready({name: value for name, value in {**SMALL, **inputs}.items() if value is not None})
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "failed", answer.text
    server.predict(**SMALL)
    return answer.json()["error"].partition("Error: ")[2]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of a folder that has halves.png."""
    halves().save(tmp_path / "halves.png")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("url", "lower"),
    [
        (data_url(halves()), "blue"),
        (data_url(halves(), "JPEG"), "blue"),
        (data_url(halves(), "WEBP"), "blue"),
        (data_url(halves("CMYK"), "JPEG"), "blue"),
        (data_url(halves("P")), "blue"),
        (turned(), "blue"),
        (animated(), "blue"),
        (with_alpha(), "white"),
    ],
    ids=["png", "jpeg", "webp", "cmyk", "palette", "turned", "animated", "alpha"],
)
def test_every_kind_of_image_is_seen_as_a_person_sees_it(server: Server, url: str, lower: str) -> None:
    above, below = redrawn(server, url)
    assert above[0] > above[1:].max() + 60
    if lower == "blue":
        assert below[2] > below[:2].max() + 60
    else:
        assert below.min() > 180


def test_16_bits(server: Server) -> None:
    above, below = redrawn(server, sixteen_bits())
    assert above.min() > 180
    assert below.max() < 80


def test_a_single_pixel_is_a_picture(server: Server) -> None:
    colours = redrawn(server, data_url(Image.new("RGB", (1, 1), BLUE)))
    assert (colours[:, 2] > colours[:, :2].max(1) + 60).all()


def test_http(server: Server, files: str) -> None:
    above, below = redrawn(server, f"{files}/halves.png")
    assert above[0] > above[2]
    assert below[2] > below[0]


def test_the_scheme_may_have_capitals(server: Server, files: str) -> None:
    """Which Cog does not take for a URL; beside one, it downloads nothing of a list."""
    plain = data_url(halves())
    capitals = "DATA" + plain.removeprefix("data"), f"{files}/halves.png".replace("http", "HTTP")
    expected = redrawn(server, plain)
    assert all((redrawn(server, url) == expected).all() for url in capitals)
    lists = ([plain] * 2, [plain, capitals[0]], [capitals[1], plain])
    made = [server.predict(**FEWEST, image_prompts=urls)["output"] for urls in lists]
    assert made[0] == made[1] == made[2]
    assert not list(server.temporary.glob("*.png"))


def test_the_picture_has_the_shape_of_the_image(server: Server) -> None:
    wide = data_url(Image.new("RGB", (300, 150), BLUE))
    sizes = {}
    for name, asked in {"image": {}, "width": {"width": 80}, "ratio": {"aspect_ratio": "9:16"}}.items():
        prediction = server.predict(image=wide, steps_prior=1, steps_decoder=1, **asked)
        sizes[name] = picture(prediction["output"][0]).size
    assert sizes == {"image": (360, 184), "width": (80, 64), "ratio": (360, 184)}


def test_image_prompts(server: Server) -> None:
    """One to four, of any shape; each changes the picture, and without strength they do not."""
    red, blue = data_url(Image.new("RGB", (80, 40), RED)), data_url(Image.new("RGB", (40, 40), BLUE))
    pictures = [
        np.asarray(picture(server.predict(**FEWEST, **inputs)["output"][0]))
        for inputs in (
            {},
            {"image_prompts": []},
            {"image_prompts": [red], "image_prompt_strengths": [0]},
            {"image_prompts": [red]},
            {"image_prompts": [red], "image_prompt_strengths": [2]},
            {"image_prompts": [red, blue]},
            {"image_prompts": [red, blue, red, blue]},
            {"image_prompts": [red, blue], "image_prompt_strengths": [0.5, 2]},
        )
    ]
    plain, *same = pictures[:3]
    assert all((one == plain).all() for one in same)
    assert len({one.tobytes() for one in pictures[2:]}) == 6


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (data_url(b"not a picture"), "image is not a picture in one of the formats JPEG, PNG, "),
        ("data:image/png;base64,!!!", "image is not a picture in one of the formats JPEG, PNG, "),
        (data_url(png_of(20_000, 20_000)), "image is too large: 64,000,000 pixels are the limit."),
        (data_url(png_of(9_000, 9_000)), "image is too large: it has 9000x9000 pixels, and 64,000,000 are the limit."),
        (data_url(png_of(100, 100)), "image is a damaged PNG file."),
        (data_url(png_of(1000, 10)), "image has 1000x10 pixels; one side may be at most 64 times the other."),
    ],
    ids=["text", "no base64", "huge", "large", "cut", "long"],
)
def test_what_is_no_picture_gets_one_sentence(server: Server, url: str, message: str) -> None:
    assert server.error(image=url).startswith(message)
    assert server.error(image_prompts=[url]).startswith(message.replace("image ", "image_prompts[0] "))
    image = data_url(halves().resize((64, 64)))  # of the size that these requests ask for, which is checked first
    assert server.error(image=image, mask=url).startswith(message.replace("image ", "mask "))
    assert refusal(server, control_images=[url]).startswith(message.replace("image ", "control_images[0] "))


@pytest.mark.parametrize("place", ["", "hello", "/etc/passwd", "PICTURE", "file://PICTURE", "../halves.png"])
def test_nothing_on_the_server_is_opened(server: Server, tmp_path: Path, place: str) -> None:
    """Cog hands on what is no URL as it is."""
    halves().save(tmp_path / "halves.png")
    place = place.replace("PICTURE", str(tmp_path / "halves.png"))
    sentence = f"is {shown(place)}; it must be an http, https or data URL of a picture"
    assert server.error(image=place) == f"image {sentence}."
    assert server.error(image=data_url(halves()), mask=place) == f"mask {sentence} or 'alpha'."
    for name, said in (("image_prompts", server.error), ("control_images", partial(refusal, server))):
        assert said(**{name: [data_url(halves()), place]}) == f"{name}[1] {sentence}."


def test_too_many_images(server: Server) -> None:
    five = [data_url(Image.new("RGB", (8, 8), RED))] * 5
    assert refusal(server, image_prompts=five) == "image_prompts has 5 images; it may have at most 4."
    assert refusal(server, control_images=five) == "control_images has 5 images; it may have at most 4."


def test_downloaded_inputs_are_deleted(server: Server) -> None:
    """After a cancelled prediction and after one that failed."""
    inputs = {"image": data_url(halves()), "image_prompts": [data_url(halves())]}
    with server.beginning():
        server.put("images", {**SLOW, **inputs}, {"Prefer": "respond-async"})
    while_it_runs = list(server.temporary.glob("cascade-inputs-*/*"))
    server.cancel("images")
    refusal(server, image=data_url(b"not a picture"))
    assert len(while_it_runs) == 2
    assert not list(server.temporary.glob("cascade-inputs-*"))
