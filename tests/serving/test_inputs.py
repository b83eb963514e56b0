"""Inputs as HTTP and the command line give them, and as Cog's server lets them through, become a request or a sentence."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cog import Path as CogPath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.guides.controls import Control
from cascade.guides.inpainting import read_mask
from cascade.images.tensors import fitted
from cascade.limits import LIMITS, InputError, shown
from cascade.pipeline import Cascade
from cascade.request import ALLOWED, Request
from scripts.command_line import read_inputs
from serving.image_urls import UrlSettings, downloaded
from serving.inputs import PICTURES, check_inputs, request_from
from tests.tiny import make_cascade

# The sentence's numbers differ: one server gives everybody less.
NARROWED = ("num_images", "seed", "steps_prior", "steps_decoder")
# Of each input.
EXAMPLES = settings.default.max_examples // 5

texts = st.text(max_size=100) | st.sampled_from(
    [
        "",
        "alpha",
        "canny",
        "16:9",
        "/etc/passwd",
        "file:///etc/passwd",
        "data:",
        "DATA:,x",
        "data:image/png;base64,!",
        "\ud800",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.integers(0, 4) | st.floats() | st.floats(0, 2) | texts
json_values = scalars | st.lists(scalars, max_size=6) | st.dictionaries(st.text(), scalars, max_size=3)


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CogPath]:
    """Files as Cog has downloaded them."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[:40, :, 3] = 0
    images = {"image": Image.fromarray(pixels[..., :3]), "hole": Image.fromarray(pixels)}
    images["mask"] = Image.fromarray(pixels[..., 3])
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return {name: CogPath(folder / f"{name}.png") for name in images}


@pytest.fixture(scope="module")
def made(cascade: Cascade) -> Callable[..., Request]:
    """The request of some inputs, as the service makes it; the others have their defaults."""

    def ask(**given: Any) -> Request:
        defaults = {name: limits.default for name, limits in LIMITS.items()}
        with downloaded(check_inputs({**defaults, **given}), PICTURES, UrlSettings()) as inputs:
            return request_from(inputs, cascade)

    return ask


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- any value ----


def sentence_of(ask: Callable[..., Any], **given: Any) -> str | None:
    """What refuses it; None if it is not refused. Another error than a ValueError goes through."""
    try:
        ask(**given)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", LIMITS)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=json_values,
    base=st.sampled_from([(), ("image",), ("image", "mask"), ("control_images",), ("image_prompts",)]),
)
def test_any_json_value_is_a_request_or_one_sentence_that_names_the_input(
    made: Callable[..., Request], files: dict[str, CogPath], name: str, value: Any, base: tuple[str, ...]
) -> None:
    present = {"image": files["image"], "mask": files["mask"]}
    present |= {"control_images": [files["image"]] * 2, "image_prompts": [files["image"]]}
    said = sentence_of(made, **{**{one: present[one] for one in base}, name: value})
    if said is not None:
        others = [one for one in base if one != name]
        assert re.match(rf"{name}\b", said) or (others and re.match("|".join(others), said)), said
        assert len(said) < 300
        assert said.endswith(".")
        assert "\n" not in said


@pytest.mark.parametrize("name", [name for name in ALLOWED if name in LIMITS and LIMITS[name].kind is not Image.Image])
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values)
def test_python_says_the_same(made: Callable[..., Request], name: str, value: Any) -> None:
    over_http = sentence_of(made, **{name: value})
    in_python = sentence_of(Request, **{"prompt": "", name: value})
    if name not in NARROWED:
        assert in_python == over_http
    elif in_python and over_http:
        assert in_python.partition(" whole number")[0] == over_http.partition(" whole number")[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_inputs=st.dictionaries(st.sampled_from(list(LIMITS)), json_values, min_size=2, max_size=6))
def test_any_values_of_several_inputs(made: Callable[..., Request], given_inputs: dict[str, Any]) -> None:
    said = sentence_of(made, **given_inputs)
    assert said is None or re.match("|".join(given_inputs), said)


def test_what_was_checked_is_checked_to_the_same(files: dict[str, CogPath]) -> None:
    """The command line checks before the model is loaded, and then calls `run`."""
    inputs = check_inputs(
        {"control_images": [files["image"]] * 3, "control_scales": [0.5], "width": 64.0, "seed": 1e23}
    )
    assert check_inputs(inputs) == inputs
    assert inputs["control_scales"] == (0.5,) * 3
    assert (inputs["control_types"], inputs["control_ranges"]) == (("canny",) * 3, (0.0, 1.0) * 3)


# ---- the same sentence for HTTP, the command line and Python ----


@pytest.mark.parametrize(
    ("name", "text", "value", "sentence"),
    [
        ("width", "63", 63, "width is 63; it must be a whole number from 64 to 4096."),
        ("width", "wide", "wide", "width is 'wide'; it must be a whole number from 64 to 4096."),
        ("height", "64.5", 64.5, "height is 64.5; it must be a whole number from 64 to 4096."),
        ("guidance_scale_prior", "21", 21, "guidance_scale_prior is 21; it must be a number from 0 to 20."),
        (
            "guidance_scale_decoder",
            "nan",
            float("nan"),
            "guidance_scale_decoder is nan; it must be a number from 0 to 20.",
        ),
        ("prompt_strength", "", "", "prompt_strength is ''; it must be a number from 0 to 1."),
        ("image_prompt_strengths", "7", [7], "image_prompt_strengths[0] is 7; it must be a number from 0 to 2."),
        ("image_prompt_strengths", "1", [1], "image_prompt_strengths needs image_prompts, which is left out."),
        ("mask", "alpha", "alpha", "mask needs image, which is left out."),
    ],
)
def test_the_same_sentence(made: Callable[..., Request], name: str, text: str, value: Any, sentence: str) -> None:
    over_http = sentence_of(made, **{name: value})
    on_the_command_line = sentence_of(lambda **_: read_inputs([f"{name}={text}"]))
    in_python = sentence_of(Request, **{"prompt": "", name: value})
    assert over_http == on_the_command_line == in_python == sentence


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"seed": True}, "seed is True; it must be a whole number."),
        ({"seed": float("inf")}, "seed is inf; it must be a whole number."),
        ({"num_images": None}, "num_images is None; it must be a whole number from 1 to 4."),
        ({"steps_prior": 2.5}, "steps_prior is 2.5; it must be a whole number from 1 to 50."),
        ({"upscale": 1}, "upscale is 1; it must be true or false."),
        ({"previews": "yes"}, "previews is 'yes'; it must be true or false."),
        (
            {"aspect_ratio": "2:1"},
            f"aspect_ratio is '2:1'; it must be one of {', '.join(LIMITS['aspect_ratio'].choices)}.",
        ),
        ({"output_format": "gif"}, "output_format is 'gif'; it must be one of webp, jpg, png."),
        ({"upscale": True}, "upscale needs image, which is left out."),
        ({"outpaint": [8, 8, 8, 8]}, "outpaint needs image, which is left out."),
        ({"outpaint": [8]}, "outpaint has 1 value; it must have 4."),
        (
            {"image": "IMAGE", "outpaint": [8, 0, 0, 0], "width": 64},
            "width is 64, but image with outpaint has 108x80 pixels, and pictures have its size.",
        ),
        ({"image": "IMAGE", "outpaint": [8, 8, 8, -8]}, "outpaint[3] is -8; it must be a whole number from 0 to 4096."),
        ({"control_scales": [1]}, "control_scales needs control_images, which is left out."),
        ({"control_images": ["IMAGE"] * 5}, "control_images has 5 images; it may have at most 4."),
        (
            {"control_images": ["IMAGE"] * 3, "control_scales": [1, 1]},
            "control_scales has 2 values; it must have 1, or 3, one for each of control_images.",
        ),
        (
            {"control_images": ["IMAGE"] * 2, "control_ranges": [0, 2.0]},
            "control_ranges[1] is 2.0; it must be a number from 0 to 1.",
        ),
        (
            {"control_images": ["IMAGE"] * 2, "control_ranges": [0.5, 0.75, 0.5, 0.25]},
            "control_ranges[2] is 0.5; it must be less than control_ranges[3], which is 0.25.",
        ),
        (
            {"control_images": ["IMAGE"] * 2, "control_ranges": [1, 1]},
            "control_ranges[0] is 1.0; it must be less than control_ranges[1], which is 1.0.",
        ),
        (
            {"control_images": ["IMAGE"] * 3, "control_ranges": [0, 0.5, 1]},
            "control_ranges has 3 values; it must have 2, or 6, two for each of control_images.",
        ),
        (
            {"image_prompts": ["IMAGE"] * 3, "image_prompt_strengths": [1, 1]},
            "image_prompt_strengths has 2 values; it must have 1, or 3, one for each of image_prompts.",
        ),
        (
            {"sampler": "euler"},
            "sampler is 'euler'; it must be one of default, ddpm, ddim, ddim_cosine, lcm.",
        ),
        ({"speed": None}, "speed is None; it must be one of exact, fast, turbo."),
        (
            {"speed": "turbo"},
            "speed is 'turbo', which needs distilled weights in the model folder (turbo/turbo.safetensors); this model has none.",
        ),
        (
            {"control_images": ["IMAGE"] * 2, "control_types": ["canny", "inpainting"]},
            "control_types[1] is 'inpainting', which needs mask or outpaint.",
        ),
        (
            {"control_images": ["IMAGE"], "control_types": "canny"},
            "control_types is 'canny'; it must be a list of up to 4 of ",
        ),
        (
            {"image": "IMAGE", "upscale": True, "control_images": ["IMAGE"] * 4},
            "control_images has 4 images; with upscale, which adds one, it may have at most 3.",
        ),
        (
            {"image": "IMAGE", "upscale": True, "width": 64, "outpaint": [8, 0, 0, 0]},
            "upscale redraws all of image at twice its size; leave out outpaint, width.",
        ),
        (
            {"image": "IMAGE", "mask": "alpha"},
            "mask is 'alpha', which needs a transparent region in image; there is none.",
        ),
        (
            {"control_images": ["IMAGE"], "control_types": ["super_resolution"], "width": 126, "height": 200},
            "width of the picture is 126; with super_resolution it must be at least 127.",
        ),
    ],
)
def test_sentences(
    made: Callable[..., Request], files: dict[str, CogPath], inputs: dict[str, Any], sentence: str
) -> None:
    real = {"IMAGE": files["image"]}
    found = {
        name: [real.get(one, one) for one in value]
        if isinstance(value, list)
        else real.get(value, value)
        if isinstance(value, str)
        else value
        for name, value in inputs.items()
    }
    with pytest.raises(InputError) as caught:
        made(**found)
    assert str(caught.value).startswith(sentence)


# ---- what a request has ----


def test_defaults(made: Callable[..., Request], cascade: Cascade) -> None:
    request = made()
    assert request == Request(
        "a red apple on a green background",
        width=cascade.native_size,
        height=cascade.native_size,
        seed=request.seed,
        steps_prior=cascade.defaults["prior"].steps,
        steps_decoder=cascade.defaults["decoder"].steps,
        guidance_scale_prior=cascade.defaults["prior"].guidance,
        guidance_scale_decoder=cascade.defaults["decoder"].guidance,
    )
    assert 0 <= request.seed < 2**32


def test_one_value_for_all(made: Callable[..., Request], files: dict[str, CogPath]) -> None:
    images = [files["image"]] * 3
    assert made(image_prompts=images).image_prompt_strengths == (1.0,) * 3
    assert made(image_prompts=images, image_prompt_strengths=[0.5]).image_prompt_strengths == (0.5,) * 3
    assert made(image_prompts=images, image_prompt_strengths=[0, 1, 2]).image_prompt_strengths == (0, 1, 2)
    controls = made(control_images=images, control_ranges=[0.25, 0.5]).controls
    assert [(one.start, one.end) for one in controls] == [(0.25, 0.5)] * 3


def test_lists_that_are_empty_are_left_out(made: Callable[..., Request], files: dict[str, CogPath]) -> None:
    lists = {name: [] for name, limits in LIMITS.items() if limits.most}
    assert "outpaint" in lists
    assert made(seed=1, image=files["image"], **lists) == made(seed=1, image=files["image"])
    assert made(seed=1, **lists) == made(seed=1)


def test_controls(made: Callable[..., Request], files: dict[str, CogPath]) -> None:
    image = Image.open(files["image"])
    one, other = made(
        control_images=[files["image"]] * 2,
        control_types=["canny", "super_resolution"],
        control_ranges=[0, 1, 0, 0.5],
        width=200,
    ).controls
    # In the pictures' size, and in half of it, as the engine would scale them.
    assert one == Control("canny", fitted(image, 128, 200))
    assert other == Control("super_resolution", fitted(image, 64, 100), end=0.5)


def test_images_come_in_the_size_in_which_they_are_used(
    made: Callable[..., Request], files: dict[str, CogPath], tmp_path: Path
) -> None:
    """What the engine makes of them is the same to the bit; with a mask, nothing is scaled but the mask."""
    image = Image.open(files["image"])
    request = made(image=files["image"], width=200)
    assert request.image.size == (request.width, request.height) == (200, 160)
    assert request.image.tobytes() == fitted(image, 160, 200).tobytes() == fitted(request.image, 160, 200).tobytes()
    Image.linear_gradient("L").resize((1000, 800)).save(tmp_path / "large.png")
    masked = made(image=files["image"], mask=CogPath(tmp_path / "large.png"))
    assert masked.image.tobytes() == image.convert("RGB").tobytes()
    assert np.array_equal(masked.mask, read_mask(Image.open(tmp_path / "large.png"), 100, 80))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            {"mask": "image"},
            "image with a mask has 4104x80 pixels, and pictures have its size; each side must have 64 to",
        ),
        (
            {"upscale": True},
            "image has 4104x80 pixels; to be enlarged to twice its size, each side must have 64 to 2048",
        ),
        (
            {"outpaint": [0, 0, 8, 0]},
            "outpaint is 0, 0, 8, 0, which makes 4112x80 pixels of image's 4104x80; each side",
        ),
        (
            {"size": (40, 90), "outpaint": [8, 8, 8, 8]},
            "image with outpaint has 56x106 pixels, and pictures have its size; each side must have 64 to 4096.",
        ),
        (
            {"size": (400, 90), "outpaint": [8, 8, 8, 8], "width": 416, "height": 90},
            "height is 90, but image with outpaint has 416x106 pixels, and pictures have its size.",
        ),
        (
            {"size": (400, 90), "mask": "image", "width": 416},
            "width is 416, but image with a mask has 400x90 pixels, and pictures have its size.",
        ),
    ],
)
def test_an_image_of_a_wrong_size_is_refused_before_it_is_decoded(
    made: Callable[..., Request], tmp_path: Path, inputs: dict[str, Any], sentence: str
) -> None:
    Image.new("L", inputs.get("size", (4104, 80))).save(tmp_path / "image.bmp")
    (tmp_path / "image.bmp").write_bytes((tmp_path / "image.bmp").read_bytes()[:2000])  # to decode it would fail
    place = CogPath(tmp_path / "image.bmp")
    inputs = {name: place if value == "image" else value for name, value in inputs.items() if name != "size"}
    assert sentence_of(made, image=place, **inputs).startswith(sentence)


def test_upscaling(made: Callable[..., Request], files: dict[str, CogPath]) -> None:
    request = made(image=files["image"], upscale=True)
    assert (request.width, request.height, request.guidance_scale_prior) == (200, 160, 1)
    assert [control.kind for control in request.controls] == ["super_resolution"]
    assert made(image=files["image"], upscale=True, guidance_scale_prior=3).guidance_scale_prior == 3


def test_the_transparent_region_is_a_mask_only_if_asked_for(
    made: Callable[..., Request], files: dict[str, CogPath]
) -> None:
    transparent = np.zeros((80, 100), bool)
    transparent[:40] = True
    request = made(image=files["hole"], mask="alpha")
    assert (np.asarray(request.mask.convert("1")) == transparent).all()
    assert request.image.size == (request.width, request.height) == (100, 80)
    plain = made(image=files["hole"])
    assert plain.mask is None
    assert (np.asarray(plain.image)[:40] == 255).all()
    larger = made(image=files["hole"], mask="alpha", outpaint=[4, 0, 0, 0])
    assert np.asarray(larger.mask.convert("1"))[:, 4:].tolist() == transparent.tolist()


# ---- pictures ----


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "file:///etc/passwd", "ftp://host/a.png", "", "hello", "data", 5, None]
)
def test_only_urls_are_opened(made: Callable[..., Request], files: dict[str, CogPath], place: Any) -> None:
    sentence = f"is {shown(place)}; it must be an http, https or data URL of a picture"
    for name in ("image_prompts", "control_images"):
        assert sentence_of(made, **{name: [files["image"], place]}) == f"{name}[1] {sentence}."
    if place is not None:
        assert sentence_of(made, image=place) == f"image {sentence}."
        assert sentence_of(made, image=files["image"], mask=place) == f"mask {sentence} or 'alpha'."


@pytest.mark.parametrize("scheme", ["data", "DATA", "Data"])
def test_what_cog_has_not_downloaded(made: Callable[..., Request], files: dict[str, CogPath], scheme: str) -> None:
    """It leaves alone schemes in capitals, and a list that has one of them."""
    image = Image.open(files["image"])
    url = scheme + data_url(image).removeprefix("data")
    assert np.array_equal(made(image=url, mask=data_url(Image.new("L", image.size, 255))).image, image)
    assert np.array_equal(made(image_prompts=[url, data_url(image)]).image_prompts[0], image)


@pytest.mark.parametrize("url", ["data:", "DATA:image/png;base64", "data:image/png;base64,%%%"])
def test_urls_that_hold_nothing(made: Callable[..., Request], url: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = sentence_of(made, image_prompts=[url])
    assert re.match(r"image_prompts\[0\] is (a data URL that cannot be decoded|not a picture in .*)\.$", said)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_which_picture_of_a_list_is_damaged(
    made: Callable[..., Request], files: dict[str, CogPath], tmp_path: Path
) -> None:
    (tmp_path / "cut.png").write_bytes(Path(files["image"]).read_bytes()[:1000])
    said = sentence_of(made, control_images=[files["image"], CogPath(tmp_path / "cut.png")])
    assert said.startswith("control_images[1] is ")


def test_a_request_names_what_the_model_leaves_open(cascade: Cascade) -> None:
    request = request_from(check_inputs({"aspect_ratio": "3:2", "seed": -1}), cascade)
    assert (request.width / request.height, request.seed) == (1.5, 2**32 - 1)
