"""Limits of every input, for HTTP, the command line and Python, and the errors for values outside of them.

`LIMITS` has the inputs of a request to the server. `predict.py` repeats them as literals, because Cog's schema generator
reads only literals. A test compares both.
"""

import math
import numbers
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cascade import sizes
from cascade.networks.controlnet import KINDS
from cascade.networks.ip_adapter import MODES

MOST_IMAGES = 4
MOST_LORAS = 8
# Per text. The text encoder reads some 1,200 of them; 50 MB would take 300 s to tokenize.
MOST_CHARACTERS = 10_000
# Of a text, of 75 tokens each.
MOST_CHUNKS = 4
RATIOS = ("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")
# Instead of a sampler: that of the model folder, or of the speed.
MODELS_OWN = "default"
# Instead of a mask: the transparent part of the image.
ALPHA = "alpha"

# Singular and plural of each kind, for errors.
_WORDS = {
    str: ("a text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    Image.Image: ("an image (PIL.Image.Image)", "images"),
}
_LONGEST_VALUE = 80


class InputError(ValueError):
    """An input has a value that is not allowed. The message is one sentence that begins with the input's name."""


@dataclass(frozen=True)
class Limits:
    """Limits of one input.

    Attributes:
        kind: str, int, float, bool, `Image.Image` or another class; for a list, the kind of its elements. Floats without a
            fraction are accepted as int, and ints as float, numpy's too. True and False are not accepted as numbers.
        default: the value if the input is left out. None: the input may be None, and its value then depends on the model
            or on other inputs.
        low, high: bounds of numbers, inclusive; None: no bound.
        choices: the allowed texts; for another kind than str, texts that are allowed too.
        fewest, most: number of elements of a list; most None: the input is not a list. An empty list counts as left out.
    """

    kind: type
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    fewest: int = 1
    most: int | None = None

    def check(self, name: str, value: Any, one: Callable[[str, Any], Any] | None = None) -> Any:
        """Check a value, and convert it to `kind`: to None or the result of `check_one`; for a list, to a tuple of these.

        Args:
            name: the input's name in errors. Elements of a list get an index, as in ``outpaint[3]``.
            value: any value.
            one: checks one value or element instead of `check_one`.

        Raises:
            InputError: the value is not allowed.
        """
        one = one or self.check_one
        if self.most is None:
            return None if value is None and self.default is None else one(name, value)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {shown(value)}; it must be {self.allowed}.")
        if value and not self.fewest <= len(value) <= self.most:
            count = counted(len(value), "image" if self.kind is Image.Image else "value")
            number = f"must have {self.most}" if self.fewest == self.most else f"may have at most {self.most}"
            raise InputError(f"{name} has {count}; it {number}.")
        return tuple(one(f"{name}[{place}]", element) for place, element in enumerate(value))

    def check_one(self, name: str, value: Any) -> Any:
        """Check a value, or a list's element, and convert it to `kind`.

        Raises:
            InputError: it is not allowed.
        """
        if self.kind in (int, float):
            found = self._number(value)
        elif isinstance(value, str) and (self.choices or self.kind is str):
            found = value if not self.choices or value in self.choices else None
        else:
            found = value if isinstance(value, self.kind) else None
        if found is None:
            raise InputError(f"{name} is {shown(value)}; it must be {self._allowed_one}.")
        if self.kind is str:
            self._check_text(name, value)
        return found

    @property
    def range(self) -> str:
        """The bounds of numbers, as in "from 0 to 2"; "" for other kinds."""
        if self.low is None:
            return ""
        return f"of at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"

    @property
    def allowed(self) -> str:
        """The allowed values, as in "a list of 4 whole numbers from 0 to 4096"."""
        if self.most is None:
            return self._allowed_one
        several = f"of {', '.join(self.choices)}" if self.choices else self._words[1]
        number = str(self.most) if self.fewest == self.most else f"up to {self.most}"
        return " ".join(filter(None, ("a list of", number, several, self.range)))

    @property
    def _allowed_one(self) -> str:
        if self.kind is str and self.choices:
            return f"one of {', '.join(self.choices)}"
        words = " ".join(filter(None, (self._words[0], self.range)))
        return " or ".join((words, *(repr(choice) for choice in self.choices)))

    @property
    def _words(self) -> tuple[str, str]:
        name = self.kind.__name__
        return _WORDS.get(self.kind, (f"a {name}", f"{name}s"))

    def _number(self, value: Any) -> int | float | None:
        """The value as `kind`; None if it is not such a number within the bounds."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return None
        try:
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            if isinstance(number, float) and not math.isfinite(number):
                return None
            if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
                return None
            return self.kind(number) if self.kind(number) == number else None
        except OverflowError:  # too large for a float
            return None

    def _check_text(self, name: str, value: str) -> None:
        if len(value) > MOST_CHARACTERS:
            raise InputError(f"{name} has {len(value):,} characters; it may have at most {MOST_CHARACTERS:,}.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON and the command line accept lone UTF-16 surrogates, and tokenizers do not.
            raise InputError(
                f"{name} has {value[error.start]!r} at place {error.start}; it must be a text of whole characters."
            ) from None


def shown(value: Any) -> str:
    """A value as text for errors: one line of at most 80 characters, without the content of arrays and images."""
    try:
        if isinstance(value, Image.Image):
            return f"an image of {value.width}x{value.height} pixels"
        if hasattr(value, "dtype") and (shape := tuple(value.shape)):
            return f"an array of the shape {shape}"[:_LONGEST_VALUE]
        text = " ".join(_repr.repr(value.item() if hasattr(value, "dtype") else value).split())
    except Exception:  # a __repr__ may fail, such as that of a whole number of more than 4,300 digits
        return f"a value of the type {type(value).__name__}"[:_LONGEST_VALUE]
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 2


def counted(count: int, noun: str) -> str:
    """A count with its noun, as in "1 image", "2 images"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def need(name: str, value: Any, other: str, present: Any) -> None:
    """Make sure that an input is given together with another one that it needs.

    Raises:
        InputError: only `name` is given.
    """
    if value and not present:
        raise InputError(f"{name} needs {other}, which is left out.")


_GUIDANCE = Limits(float, low=0, high=20)
_STEPS = Limits(int, low=1, high=50)
_SIDE = Limits(int, low=sizes.SMALLEST, high=sizes.LARGEST)
_PICTURE = Limits(Image.Image)
_PICTURES = Limits(Image.Image, most=MOST_IMAGES)
_STRENGTHS = Limits(float, low=0, high=2, most=MOST_IMAGES)

# In the order of `Predictor.run`. `request.ALLOWED` has the wider limits of `Request`.
LIMITS: dict[str, Limits] = {
    "prompt": Limits(str, "a red apple on a green background"),
    "negative_prompt": Limits(str, ""),
    "width": _SIDE,
    "height": _SIDE,
    "num_images": Limits(int, 1, low=1, high=4),
    "steps_prior": _STEPS,
    "steps_decoder": _STEPS,
    "guidance_scale_prior": _GUIDANCE,
    "guidance_scale_decoder": _GUIDANCE,
    # Not None for the model's own: Cog refuses null for an input with choices.
    "sampler": Limits(str, MODELS_OWN, choices=(MODELS_OWN, "ddpm", "ddim", "ddim_cosine", "lcm")),
    "speed": Limits(str, "exact", choices=("exact", "fast", "turbo")),
    "seed": Limits(int),
    "aspect_ratio": Limits(str, "1:1", choices=RATIOS),
    "compression": Limits(float, sizes.SEMANTIC_PIXELS, low=sizes.DENSEST, high=sizes.SPARSEST),
    "output_format": Limits(str, "webp", choices=("webp", "jpg", "png")),
    "output_quality": Limits(int, 80, low=0, high=100),
    "disable_safety_checker": Limits(bool, False),
    "image_prompts": _PICTURES,
    "image_prompt_strengths": _STRENGTHS,
    "ip_adapter_images": _PICTURES,
    "ip_adapter_scales": _STRENGTHS,
    "ip_adapter_masks": _PICTURES,
    "ip_adapter_mode": Limits(str, "all", choices=MODES),
    "image": _PICTURE,
    "prompt_strength": Limits(float, 0.8, low=0, high=1),
    "mask": Limits(Image.Image, choices=(ALPHA,)),
    "outpaint": Limits(int, low=0, high=sizes.LARGEST, fewest=4, most=4),
    "upscale": Limits(bool, False),
    "control_images": _PICTURES,
    "control_types": Limits(str, choices=tuple(KINDS), most=MOST_IMAGES),
    "control_scales": _STRENGTHS,
    # Pairs: start and end.
    "control_ranges": Limits(float, low=0, high=1, most=2 * MOST_IMAGES),
    "previews": Limits(bool, False),
    "prompt_weighting": Limits(bool, False),
    "lora_weights": Limits(str, most=MOST_LORAS),
    "lora_scales": Limits(float, low=-2, high=3, most=MOST_LORAS),
}
