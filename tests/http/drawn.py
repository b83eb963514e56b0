"""Requests of every kind, drawn by a generator of random numbers, and what their answers must have."""

import io
import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tests.http.serving import data_url, picture

RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
FORMATS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}
PROMPTS = ["", "a red apple on a green background", "two cups, one blue", "ein gelber Hund 🐕", "a house " * 60]
MODES = {"RGB": "PNG", "RGBA": "PNG", "L": "PNG", "P": "PNG", "I;16": "PNG", "YCbCr": "JPEG", "CMYK": "JPEG"}
# What a test of one request after the other calls a kind.
KINDS = (
    "text",
    "image",
    "mask",
    "outpaint",
    "image_prompts",
    "controls",
    "controlled_mask",
    "upscale",
    "loras",
    "everything",
)


@dataclass(frozen=True)
class Model:
    """What of a model the requests may use.

    Attributes:
        native_size: pixels, the edge of the square that is made when no size is asked for.
        controls: the kinds of its ControlNets.
        smallest, largest: pixels, the sides that are asked for.
        steps: the most steps of a stage.
        loras: the names of those in its folder.
    """

    native_size: int = 256
    controls: tuple[str, ...] = ("canny", "inpainting")
    smallest: int = 64
    largest: int = 384
    steps: int = 3
    loras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A request, and what its answer must have.

    Attributes:
        kind: of `KINDS`.
        inputs: as they are sent.
        count: how many pictures.
        size: (width, height) of each; None: of about the area that the model draws best.
        format: Pillow's name of the files' format.
        phases: the names of the metric ``seconds`` that must be above 0.
    """

    kind: str
    inputs: dict[str, Any]
    count: int
    size: tuple[int, int] | None
    format: str
    phases: set[str] = field(default_factory=set)


def drawing(random: Random, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture with some shapes on it."""
    image = Image.new("RGBA", (width, height), tuple(random.randrange(256) for _ in range(4)))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = sorted(random.randrange(width) for _ in range(2)), sorted(random.randrange(height) for _ in range(2))
        pen.ellipse((x[0], y[0], x[1], y[1]), fill=tuple(random.randrange(256) for _ in range(4)))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("YCbCr", "CMYK", "P") else image.convert(mode)


def sent_drawing(random: Random, width: int, height: int) -> str:
    """One in any mode, as a data URL."""
    mode = random.choice(list(MODES))
    return data_url(drawing(random, width, height, mode), MODES[mode])


def mask(random: Random, width: int, height: int) -> str:
    """A mask of which some is white and some is black."""
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).rectangle((0, 0, random.randrange(1, width), height), fill=255)
    return data_url(image)


def draw(random: Random, model: Model, kind: str | None = None) -> Drawn:
    """A request that must succeed.

    Args:
        random: the source of all choices.
        model: what it may use.
        kind: of `KINDS`; None: any that the model can make.
    """
    needed = {"upscale": "super_resolution" in model.controls, "loras": bool(model.loras)}
    possible = [one for one in KINDS if needed.get(one, True)]
    kind = kind or random.choice(possible)

    def side() -> int:
        return random.randrange(model.smallest, model.largest + 1)

    inputs: dict[str, Any] = {"prompt": random.choice(PROMPTS), "seed": random.randrange(2**32)}
    optional = {
        "negative_prompt": lambda: random.choice(PROMPTS),
        "guidance_scale_prior": lambda: random.choice([0, 1, 4.0, 7.5]),
        "guidance_scale_decoder": lambda: random.choice([0, 1.1, 2]),
        "output_quality": lambda: random.randrange(101),
        "previews": lambda: True,
        "num_images": lambda: random.randrange(1, 5),
        "sampler": lambda: random.choice(["default", "ddpm", "ddim", "ddim_cosine", "lcm"]),
        "speed": lambda: random.choice(["exact", "fast"]),
        "disable_safety_checker": lambda: True,
        "compression": lambda: random.choice([32, 42.67, 64]),
    }
    inputs |= {name: make() for name, make in optional.items() if random.random() < 0.3}
    inputs["steps_prior"], inputs["steps_decoder"] = (random.randrange(1, model.steps + 1) for _ in range(2))
    inputs["output_format"] = random.choice(list(FORMATS))
    size: tuple[int, int] | None = None
    phases = {"text", "prior", "decoder"}

    if kind in ("mask", "controlled_mask", "outpaint", "everything"):
        size = side(), side()
        inputs["image"] = sent_drawing(random, *size)
        if kind == "outpaint":
            added = [random.randrange(0, 33) for _ in range(3)] + [8]
            inputs["outpaint"] = added
            size = size[0] + added[0] + added[2], size[1] + added[1] + added[3]
        else:
            inputs["mask"] = mask(random, *size)
    elif kind == "image":
        inputs["image"] = sent_drawing(random, side(), side())
        inputs["prompt_strength"] = random.choice([0.0, 0.3, 0.8, 1.0])
        if inputs["prompt_strength"] == 0:
            phases.discard("prior")
    elif kind == "upscale":
        half = max(model.smallest, side() // 2), max(model.smallest, side() // 2)
        inputs |= {"image": sent_drawing(random, *half), "upscale": True}
        size = 2 * half[0], 2 * half[1]
    if kind in ("image_prompts", "everything"):
        count = random.randrange(1, 5)
        inputs["image_prompts"] = [sent_drawing(random, side(), side()) for _ in range(count)]
        if random.random() < 0.5:
            inputs["image_prompt_strengths"] = [random.choice([0.5, 1, 1.5]) for _ in range(count)]
    if kind in ("controls", "controlled_mask", "everything"):
        masked = kind != "controls"
        kinds = [one for one in model.controls if masked or one != "inpainting"]
        if masked:
            kinds = [one for one in kinds if one != "super_resolution" or min(size) >= 2 * model.smallest]
        count = random.randrange(1, 4)
        inputs["control_images"] = [sent_drawing(random, side(), side()) for _ in range(count)]
        inputs["control_types"] = [random.choice(kinds) for _ in range(count)]
        if random.random() < 0.5:
            inputs["control_scales"] = [random.choice([0.0, 0.5, 1.0])] * count
            inputs["control_ranges"] = [0.0, random.choice([0.5, 1.0])]
        if "super_resolution" in inputs["control_types"] and not masked:
            size = max(2 * model.smallest, side()), max(2 * model.smallest, side())
    if model.loras and (kind in ("loras", "everything") or random.random() < 0.3):
        names = [random.choice(model.loras) for _ in range(random.randrange(1, 4))]
        inputs |= {"lora_weights": names, "lora_scales": [random.choice([-0.5, 0, 0.5, 1, 1.5]) for _ in names]}
        inputs["prompt"] += f" {random.choice(names)}"
    if size is None:
        if random.random() < 0.6:
            size = side(), side()
        elif kind in ("text", "image_prompts", "controls", "loras"):
            inputs["aspect_ratio"] = random.choice(RATIOS)
    if size is not None and not {"mask", "outpaint", "upscale"} & set(inputs):
        inputs |= dict(zip(("width", "height"), size, strict=True))
    if {"image", "image_prompts", "control_images"} & set(inputs):
        phases.add("input_images")
    return Drawn(kind, inputs, inputs.get("num_images", 1), size, FORMATS[inputs["output_format"]], phases)


def check(drawn: Drawn, prediction: dict[str, Any], model: Model) -> list[np.ndarray]:
    """Asserts that an answer has what it must have.

    Returns:
        The pictures, uint8 (height, width, 3).
    """
    assert prediction["status"] == "succeeded", (drawn.kind, shown(drawn.inputs), prediction.get("error"))
    images = [picture(output) for output in prediction["output"]]
    assert len(images) == drawn.count
    for image in images:
        assert image.format == drawn.format
        if drawn.size is not None:
            assert image.size == drawn.size
        else:
            assert 0.8 < math.sqrt(image.width * image.height) / model.native_size < 1.25
        # What is not finite would be black. Plain and even white pictures are right, where ControlNets with random weights
        # steer a few steps.
        assert np.asarray(image).any(), ("a black picture", drawn.kind, shown(drawn.inputs))
    metrics = prediction["metrics"]
    first = drawn.inputs["seed"]
    assert metrics["seeds"] == [(first + i) % 2**32 for i in range(drawn.count)]
    seconds = metrics["seconds"]
    assert all(seconds.get(name, 0) > 0 for name in drawn.phases), (drawn.kind, drawn.phases, seconds)
    assert ("input_images" in seconds) == ("input_images" in drawn.phases)
    return [np.asarray(image) for image in images]


def shown(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for an error's text: of pictures, the beginning."""
    return {name: repr(value)[:60] for name, value in inputs.items()}


def bad_inputs(random: Random) -> dict[str, Any]:
    """A request that must fail, with one sentence."""
    half = io.BytesIO()
    drawing(random, 64, 64).save(half, "PNG")
    return random.choice(
        [
            {"image": data_url(half.getvalue()[: len(half.getvalue()) // 2])},
            {"image": "hello"},
            {"mask": mask(random, 64, 64)},
            {"image_prompt_strengths": [1.0]},
            {"control_images": [sent_drawing(random, 64, 64)], "control_types": ["none of them"]},
            {"image": sent_drawing(random, 64, 64), "outpaint": [1, 2]},
            {"prompt": "word " * 100_000},
        ]
    )
