"""`Request`: the inputs of a `Cascade`, checked when the request is made. Knows no network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from PIL import Image

from cascade import sizes
from cascade.guides.controls import Control, check_span
from cascade.guides.inpainting import check_mask, transparent
from cascade.guides.ip_adapter import Reference, read_mask
from cascade.limits import ALPHA, LIMITS, MOST_IMAGES, MOST_LORAS, InputError, Limits, counted, need
from cascade.loras.lora import Lora
from cascade.prompts.parsing import check_weights

LARGEST_SEED = 2**63 - 1
# Inputs that have one value for each of another's images, or none.
ONE_EACH = {
    "image_prompt_strengths": "image_prompts",
    **{f"ip_adapter_{name}": "ip_adapter_images" for name in ("scales", "masks", "starts", "ends")},
}
# The super-resolution ControlNet's image is scaled to half of the picture, rounded up, which must be at least SMALLEST.
SMALLEST_ENLARGED = 2 * sizes.SMALLEST - 1


@dataclass(frozen=True)
class Request:
    """A request for pictures.

    Attributes:
        prompt, negative_prompt: what the pictures show, and what not, in up to 10,000 characters and 300 tokens each; tokens
            beyond are cut, with a warning. The latter acts through guidance only. `embedding:NAME`, after a blank or at
            the beginning, stands for the vectors of the model folder's file `embeddings/NAME.safetensors`.
        width, height: pixels, 64 to 4096; None: the model's native size, or with an `image`, its aspect ratio at the native
            area (`sizes.fitted_size`). If a side exceeds 2048, Stage B works in tiles.
        compression: pixels, 32 to 64: the side of a semantic latent. At 64, Stage C composes a picture of 2048x2048 in 32x32
            latents, close to its native 24x24, in which objects are not repeated.
        num_images: how many pictures, at least 1.
        seed: 0 to 2**63 - 1. Picture i of seed s is picture 0 of seed s + i.
        steps_prior, steps_decoder: steps of Stages C and B, 1 to 1000; None: the model folder's, or what `speed` says.
        guidance_scale_prior, guidance_scale_decoder: 0 to 20; 1 or less turns guidance off, which is twice as fast;
            None: the model folder's, or what `speed` says.
        sampler: of both stages: a key of `sampling.SAMPLERS`; "default": the model folder's, or what `speed` says.
        guidance_interval: a pair, 0 to 1: Stage C is guided in step i of the n that are taken, from 0, if start <= i / n < end;
            the other steps, without guidance, are twice as fast. Empty: all steps.
        speed: "exact": the model folder's settings. "fast": fewer steps, and "turbo": the fewest, with the model folder's
            distilled weights; `speeds.SPEEDS` has their settings. Given steps, guidance, sampler and interval override
            those of the speed.
        prompt_weighting: whether brackets in the prompts are weights, as in ComfyUI: `(word)`, `(word:1.3)`, from -4 to 4, and
            `\\(` a bracket. Otherwise they are text.
        weight_pooled: whether these weights act on the pooled text too, which decides backgrounds and is all that Stage B sees
            of a prompt (`prompts.encoding.weighted_pooled`). ComfyUI's do not.
        repeat_prompts: whether a prompt and a negative prompt of different lengths are repeated until they are equally long,
            as in ComfyUI (`prompts.text.repeated`). Otherwise each counts at its own length, so that what one does to the
            picture does not depend on how long the other is.
        image_prompts: up to 4 images of any size and mode. They describe the pictures together with the prompt.
        image_prompt_strengths: 0 to 2, factors for the image embeddings, one per image; empty: 1. The network normalises
            its condition tokens, so half the strength is not half the effect.
        ip_adapter_images: up to 4 reference images of any size and mode for the IP-Adapter, which takes more from them than
            `image_prompts`. What several of them add is summed.
        ip_adapter_scales: 0 to 2, factors for what the images add, one per image; empty: 1. At 0, an image is ignored.
        ip_adapter_masks: where in the pictures an image acts: fully where its mask is white, half where it is grey of 128, not
            where it is black or transparent; one per image, of any size and mode; empty: everywhere. A mask is scaled to
            the pictures' size, and what exceeds their aspect ratio is cropped evenly.
        ip_adapter_mode: which of the adapted blocks of Stage C are used: "all"; for "style" and "composition", those that
            the adapter's configuration names.
        ip_adapter_starts, ip_adapter_ends: 0 to 1, the steps of Stage C in which an image is used: step i of n, from 0, if
            start <= i / n < end; one per image; empty: 0 and 1.
        image: the start image for image-to-image, of any size and mode. It is scaled to the pictures' size, and what exceeds
            their aspect ratio is cropped evenly.
        prompt_strength: 0 to 1, how much of `image` changes. Its latents are noised to this time, and this share of
            `steps_prior` is taken from there, at least one step. 1 starts from noise, as without an image. 0 skips Stage C:
            Stages B and A decode the image's latents.
        mask: inpainting: where the mask is white, `image` is repainted. Grey of 128 or more counts as white, transparency
            does not. It has the image's aspect ratio, any size and any mode; "alpha": the pixels of `image` that are at
            least half transparent. With a mask, pictures have the image's size, and exactly its pixels outside of the mask.
        controls: up to 4, see `Control`. The kind "inpainting" needs a mask. With a mask and no control of that kind, the
            model's inpainting ControlNet, if it has one, is used at scale 1.

        loras: up to 8, see `Lora`: adapters of Stages C and B and the text encoder. Their changes are added up. Words that they
            bring may be used in the prompts, by name.

    A float without a fraction is accepted as a whole number, a numpy number as a number, and a list as a tuple. Attributes
    are converted to int, float and tuple, and `mask` to an image of mode "1" in the size of `image`.

    Raises:
        InputError: a ValueError. Its one sentence names an attribute that has the wrong type or is out of range.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_images: int = LIMITS["num_images"].default
    seed: int = 0
    steps_prior: int | None = None
    steps_decoder: int | None = None
    guidance_scale_prior: float | None = None
    guidance_scale_decoder: float | None = None
    sampler: str = LIMITS["sampler"].default
    guidance_interval: Sequence[float] = ()
    speed: str = LIMITS["speed"].default
    prompt_weighting: bool = False
    weight_pooled: bool = False
    repeat_prompts: bool = False
    image_prompts: Sequence[Image.Image] = ()
    image_prompt_strengths: Sequence[float] = ()
    ip_adapter_images: Sequence[Image.Image] = ()
    ip_adapter_scales: Sequence[float] = ()
    ip_adapter_masks: Sequence[Image.Image] = ()
    ip_adapter_mode: str = LIMITS["ip_adapter_mode"].default
    ip_adapter_starts: Sequence[float] = ()
    ip_adapter_ends: Sequence[float] = ()
    image: Image.Image | None = None
    prompt_strength: float = LIMITS["prompt_strength"].default
    mask: Image.Image | Literal["alpha"] | None = None
    controls: Sequence[Control] = ()
    loras: Sequence[Lora] = ()
    compression: float = LIMITS["compression"].default

    def __post_init__(self) -> None:
        for name, limits in ALLOWED.items():
            # Converts lists to tuples, and numpy's numbers to Python's.
            object.__setattr__(self, name, limits.check(name, getattr(self, name)))
        if self.prompt_weighting:
            check_prompt_weights(self.prompt, self.negative_prompt)
        for name, images in ONE_EACH.items():
            check_one_each(name, getattr(self, name), images, getattr(self, images))
        # As grey, so that they are read once.
        masks = (read_mask(f"ip_adapter_masks[{i}]", mask) for i, mask in enumerate(self.ip_adapter_masks))
        object.__setattr__(self, "ip_adapter_masks", tuple(masks))
        if self.guidance_interval:
            start, end = self.guidance_interval
            check_span("guidance_interval[0]", start, "guidance_interval[1]", end)
        for place, one in enumerate(self.references):
            check_span(f"ip_adapter_starts[{place}]", one.start, f"ip_adapter_ends[{place}]", one.end)
        self._check_mask()
        for place, control in enumerate(self.controls):
            check_kind(f"controls[{place}].kind", control.kind, "mask", self.mask)
        self._check_enlarged()

    @property
    def references(self) -> tuple[Reference, ...]:
        """The images of the IP-Adapter, each with its own of the other inputs."""
        count = len(self.ip_adapter_images)
        columns = (
            self.ip_adapter_scales or (1.0,) * count,
            self.ip_adapter_starts or (0.0,) * count,
            self.ip_adapter_ends or (1.0,) * count,
            self.ip_adapter_masks or (None,) * count,
        )
        return tuple(Reference(*column) for column in zip(self.ip_adapter_images, *columns, strict=True))

    def _check_mask(self) -> None:
        if self.mask is None:
            return
        need("mask", self.mask, "image", self.image)
        check_masked(self.image.size, self.width, self.height)
        # Stored as read, so that copies of the request (`dataclasses.replace`) need not read it again.
        mask = transparent(self.image) if self.mask == ALPHA else check_mask(self.mask, *self.image.size)
        object.__setattr__(self, "mask", mask)

    def _check_enlarged(self) -> None:
        if all(control.kind != "super_resolution" for control in self.controls):
            return
        for name in ("width", "height"):
            side = getattr(self, name)
            if side is not None and side < SMALLEST_ENLARGED:
                raise InputError(
                    f"{name} of the picture is {side}; with super_resolution it must be at least {SMALLEST_ENLARGED}."
                )


def check_prompt_weights(prompt: str, negative_prompt: str) -> None:
    """Make sure that the weights in both prompts lie between -4 and 4.

    Raises:
        InputError: one does not.
    """
    check_weights("prompt", prompt)
    check_weights("negative_prompt", negative_prompt)


def check_one_each(name: str, values: Sequence[object], images: str, there: Sequence[object]) -> None:
    """Make sure that there are as many values as images, or none.

    Args:
        name: of the values, one of `ONE_EACH`.
        images: the name of the images, which are `there`.

    Raises:
        InputError: the numbers differ.
    """
    need(name, values, images, there)
    if values and len(values) != len(there):
        noun = "image" if ALLOWED[name].kind is Image.Image else "value"
        raise InputError(
            f"{name} has {counted(len(values), noun)}; it must have {len(there)}, one for each of {images}."
        )


def check_kind(name: str, kind: str, other: str, mask: object) -> None:
    """Make sure that a control of the kind "inpainting" has a mask.

    Args:
        name, other: names of the kind and of the mask in the error.

    Raises:
        InputError: it has none.
    """
    if kind == "inpainting" and mask is None:
        raise InputError(f"{name} is {kind!r}, which needs {other}.")


def check_masked(image: tuple[int, int], width: int | None, height: int | None, by: str = "a mask") -> None:
    """Make sure that an image can have a mask, and that pictures may have its size.

    Args:
        image: its (width, height) in pixels.
        width, height: what is asked for the pictures; None: the image's.
        by: what makes pictures have the image's size, in the error: a mask, or outpaint, with which the size is the canvas's.

    Raises:
        InputError: it is too small or too large, or another size is asked for.
    """
    size = f"image with {by} has {image[0]}x{image[1]} pixels, and pictures have its size"
    for name, asked, side in (("width", width, image[0]), ("height", height, image[1])):
        if asked not in (None, side):
            raise InputError(f"{name} is {asked}, but {size}.")
    if min(image) < sizes.SMALLEST or max(image) > sizes.LARGEST:
        raise InputError(f"{size}; each side must have {sizes.SMALLEST} to {sizes.LARGEST}.")


def check_enlarged(width: int, height: int) -> None:
    """Make sure that an image of this size can be enlarged to twice its size.

    Raises:
        InputError: it is too small or too large.
    """
    if min(width, height) < sizes.SMALLEST or 2 * max(width, height) > sizes.LARGEST:
        size, limits = f"{width}x{height} pixels", f"{sizes.SMALLEST} to {sizes.LARGEST // 2}"
        raise InputError(f"image has {size}; to be enlarged to twice its size, each side must have {limits}.")


def upscaling(image: Image.Image, prompt: str = "", **options: Any) -> Request:
    """The request that enlarges an image to twice its size.

    The super-resolution ControlNet guides Stage C. It reads the image's semantic latents, enlarged to twice their size.

    Args:
        image: sides from 64 to 2048 pixels.
        prompt: what the image shows.
        options: attributes of `Request`, except mask, width and height; up to 3 controls. `guidance_scale_prior` is 1 by
            default, as in the authors' example.

    Raises:
        InputError: as `Request`; or the image is too small or too large, or there is a mask, a width or a height.
    """
    LIMITS["image"].check_one("image", image)
    for name in ("mask", "width", "height"):
        if name in options:
            raise InputError(f"{name} does not go with upscaling, which makes all of the image in twice its size.")
    check_enlarged(*image.size)
    controls = replace(ALLOWED["controls"], most=MOST_IMAGES - 1).check("controls", options.pop("controls", ()))
    size = {"width": 2 * image.width, "height": 2 * image.height}
    controls = (Control("super_resolution", image), *controls)
    return Request(prompt, **size, controls=controls, **{"guidance_scale_prior": 1.0, **options})


def smaller_requests(request: Request) -> Iterator[Request]:
    """Requests for one picture of half the area, a quarter of it and so on, of the same aspect ratio.

    Args:
        request: it must have a width and a height.
    """
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


# The server's limits. Some are wider here, because the server's callers share one GPU. Some inputs exist in Python only.
ALLOWED: dict[str, Limits] = {
    **{field.name: LIMITS[field.name] for field in fields(Request) if field.name in LIMITS},
    "num_images": replace(LIMITS["num_images"], high=None),
    "steps_prior": replace(LIMITS["steps_prior"], high=1000),
    "steps_decoder": replace(LIMITS["steps_decoder"], high=1000),
    "seed": Limits(int, 0, low=0, high=LARGEST_SEED),
    "guidance_interval": Limits(float, low=0, high=1, fewest=2, most=2),
    "ip_adapter_starts": replace(LIMITS["control_ranges"], most=MOST_IMAGES),
    "ip_adapter_ends": replace(LIMITS["control_ranges"], most=MOST_IMAGES),
    "weight_pooled": Limits(bool, False),
    "repeat_prompts": Limits(bool, False),
    "controls": Limits(Control, most=MOST_IMAGES),
    "loras": Limits(Lora, most=MOST_LORAS),
}
