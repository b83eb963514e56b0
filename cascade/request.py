"""What can be asked of a `Cascade`: a `Request`, checked when it is made. Knows no network."""

import math
from dataclasses import dataclass

from PIL import Image

from cascade import sizes
from cascade.controls import Control
from cascade.inpainting import check_mask
from cascade.sampling import SAMPLERS

LARGEST_SEED = 2**63 - 1
MOST_STEPS = 1000
MOST_IMAGES = 4  # image prompts, and controls


@dataclass(frozen=True)
class Request:
    """What to make.

    Attributes:
        prompt, negative_prompt: what the pictures show, and what not. The latter acts through guidance only.
        width, height: pixels, 64 to 2048; None: the size that the model draws best, or with an `image` the one of its
            shape and that area (`sizes.fitted_size`).
        num_images: how many pictures, at least 1.
        seed: 0 to 2**63 - 1. Picture i is picture 0 of the seed i higher.
        steps_prior, steps_decoder: of Stages C and B, 1 to 1000; None: as the model folder says.
        guidance_scale_prior, guidance_scale_decoder: at least 0; 1 or less is no guidance, in half the time; None: as
            the model folder says.
        sampler: of both stages: "ddpm", "ddim" or "lcm".
        image_prompts: up to 4 images of any size and mode that say, beside the prompt, what the pictures show.
        image_prompt_strengths: what their embeddings are multiplied with, at least 0, one an image; empty: 1. The
            network normalises what it makes of them, so that half the strength is not half the effect.
        image: what to begin with instead of noise, of any size and mode: image-to-image. It is scaled to the pictures'
            size, and what exceeds their shape cut off evenly.
        prompt_strength: 0 to 1, how much of `image` is painted anew: the time to which Stage C's latents are noised,
            and the share of `steps_prior` that is taken from there, at least one step. 1 begins with noise, as
            without an image; at 0, there is no Stage C, and Stages B and A paint what the image's latents say.
        mask: what of `image` is made anew, where it is white (a grey of 128 and more counts as white, what is
            transparent does not): inpainting. Of the image's shape, in any size and mode. The pictures then have the
            image's size, and outside of the mask its pixels, exactly.
        controls: up to 4, see `Control`. One of the kind "inpainting" needs a mask; with a mask and none of that kind,
            the model's inpainting ControlNet, if it has one, is used at scale 1.

    Raises:
        TypeError, ValueError: an attribute of the wrong kind or outside of its range.
    """

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    seed: int = 0
    steps_prior: int | None = None
    steps_decoder: int | None = None
    guidance_scale_prior: float | None = None
    guidance_scale_decoder: float | None = None
    sampler: str = "ddpm"
    image_prompts: tuple[Image.Image, ...] = ()
    image_prompt_strengths: tuple[float, ...] = ()
    image: Image.Image | None = None
    prompt_strength: float = 0.8
    mask: Image.Image | None = None
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be a text.")
        self._check_integer("num_images", 1)
        self._check_integer("seed", 0, LARGEST_SEED)
        for name in ("width", "height"):
            if getattr(self, name) is not None:
                self._check_integer(name, sizes.SMALLEST, sizes.LARGEST)
        for name in ("steps_prior", "steps_decoder"):
            if getattr(self, name) is not None:
                self._check_integer(name, 1, MOST_STEPS)
        for name in ("guidance_scale_prior", "guidance_scale_decoder"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}; it must be a number of at least 0.")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}.")
        self._check_images()
        self._check_mask()
        self._check_controls()

    def _check_images(self) -> None:
        if not isinstance(self.image, Image.Image | None):
            raise TypeError(f"image is {self.image!r}; it must be an image.")
        if not isinstance(self.prompt_strength, int | float) or not 0 <= self.prompt_strength <= 1:
            raise ValueError(f"prompt_strength is {self.prompt_strength!r}; it must be a number from 0 to 1.")
        count = len(self.image_prompts)
        if count > MOST_IMAGES:
            raise ValueError(f"image_prompts has {count} images; {MOST_IMAGES} are the limit.")
        for image in self.image_prompts:
            if not isinstance(image, Image.Image):
                raise TypeError(f"image_prompts has {image!r} in it; it must have images only.")
        if self.image_prompt_strengths and len(self.image_prompt_strengths) != count:
            raise ValueError(
                f"image_prompt_strengths has {len(self.image_prompt_strengths)} numbers; image_prompts has {count} images."
            )
        for strength in self.image_prompt_strengths:
            if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
                raise ValueError(f"image_prompt_strengths has {strength!r} in it; it must have numbers of at least 0.")

    def _check_mask(self) -> None:
        if self.mask is None:
            return
        if not isinstance(self.mask, Image.Image):
            raise TypeError(f"mask is {self.mask!r}; it must be an image.")
        if self.image is None:
            raise ValueError("There is a mask, but no image; a mask says what of an image is made anew.")
        size = f"{self.image.width}x{self.image.height} pixels"
        if min(self.image.size) < sizes.SMALLEST or max(self.image.size) > sizes.LARGEST:
            limits = f"{sizes.SMALLEST} to {sizes.LARGEST}"
            raise ValueError(f"image has {size}; with a mask, which leaves its size, each side must have {limits}.")
        for name, side in zip(("width", "height"), self.image.size, strict=True):
            if getattr(self, name) not in (None, side):
                asked = f"{name} is {getattr(self, name)}"
                raise ValueError(f"{asked}, but image has {size}, and with a mask pictures have its size.")
        # So that it is read once, however often the request is copied (`dataclasses.replace`).
        object.__setattr__(self, "mask", check_mask(self.mask, *self.image.size))

    def _check_controls(self) -> None:
        if len(self.controls) > MOST_IMAGES:
            raise ValueError(f"controls has {len(self.controls)} controls; {MOST_IMAGES} are the limit.")
        for control in self.controls:
            if not isinstance(control, Control):
                raise TypeError(f"controls has {control!r} in it; it must have controls only.")
            if control.kind == "inpainting" and self.mask is None:
                raise ValueError("controls has one of the kind 'inpainting', which needs a mask; there is none.")

    def _check_integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if type(value) is not int or value < low or (high is not None and value > high):
            allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} is {value!r}; it must be a whole number {allowed}.")


def upscaling(image: Image.Image, prompt: str = "", **options: object) -> Request:
    """The request for a picture like an image, of twice its size: of its semantic latents, each in four places, the
    super-resolution ControlNet makes what guides Stage C.

    Args:
        image: sides from 64 to 1024 pixels.
        prompt: what the image shows.
        options: of `Request`, other than width and height. `guidance_scale_prior` is 1 unless it says otherwise: so do
            the authors enlarge.

    Raises:
        TypeError, ValueError: as `Request`; the image is too small or too large.
    """
    if min(image.size) < sizes.SMALLEST or 2 * max(image.size) > sizes.LARGEST:
        size, limits = f"{image.width}x{image.height} pixels", f"{sizes.SMALLEST} to {sizes.LARGEST // 2}"
        raise ValueError(f"image has {size}; to be enlarged to twice its size, each side must have {limits}.")
    controls = (Control("super_resolution", image), *options.pop("controls", ()))
    size = {"width": 2 * image.width, "height": 2 * image.height}
    return Request(prompt, **size, controls=controls, **{"guidance_scale_prior": 1.0, **options})
