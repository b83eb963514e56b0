"""The inputs of `predict.py` as fields of a form: read from `Predictor.run`, so that whatever it takes, the page has.

Gradio, whose import takes seconds, is imported where components are made.
"""

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cog

from predict import Predictor

if TYPE_CHECKING:
    from gradio.components import Component

# The page's own business: it always shows previews if there is a previewer.
NOT_SHOWN = ("self", "previews")
SEPARATORS = {str: re.compile(r"\n"), int: re.compile(r"[,;\s]+"), float: re.compile(r"[,;\s]+")}
# Choices up to this many are buttons, more are a menu.
MOST_BUTTONS = 4
# What stands under the prompt. All other inputs are in the folds, by the beginnings of their names; new ones in the first.
BASIC = ("aspect_ratio", "num_images", "seed")
FOLDS = {
    "Settings": (),
    "Start from an image": ("image", "prompt_strength", "mask", "outpaint", "upscale"),
    "Image prompts": ("image_prompt",),
    "Edges and other controls": ("control_",),
    "IP-Adapter": ("ip_adapter_",),
    "LoRAs": ("lora_",),
}


@dataclass(frozen=True)
class Field:
    """An input of `Predictor.run`.

    Attributes:
        name, description, default: as in its signature.
        kind: str, int, float, bool or `cog.Path`; of a list, that of its elements.
        many: whether it is a list.
        low, high: bounds of a number; None: no bound.
        choices: the allowed texts; empty: any.
    """

    name: str
    kind: type
    many: bool
    description: str
    default: Any
    low: float | None
    high: float | None
    choices: Sequence[str]

    @property
    def label(self) -> str:
        words = self.name.replace("_", " ").capitalize()
        return words.replace("Lora", "LoRA").replace("Ip adapter", "IP-Adapter")

    @property
    def is_file(self) -> bool:
        return issubclass(self.kind, cog.Path)

    def component(self, **options: Any) -> "Component":
        """A Gradio component whose value is the input's, see `shown` and `given`. Limits are checked by `check_inputs`."""
        import gradio as gr

        options = {"label": self.label, "elem_id": self.name, **options}
        if self.is_file:
            return self._file(options)
        options = {"info": self.description, "value": self.shown(self.default), **options}
        if self.kind is bool:
            return gr.Checkbox(**options)
        if choices := self._choices():
            few = len(choices) <= MOST_BUTTONS
            return gr.Radio(choices, **options) if few else gr.Dropdown(choices, **options)
        if self.many or self.is_text:
            rows = (
                {"lines": 2}
                if self.many and self.kind is str
                else {"lines": 1, "max_lines": 8 if self.kind is str else 1}
            )
            hint = {} if self.kind is str or self.many else {"placeholder": "automatic"}
            return gr.Textbox(**{**rows, **hint, **options})
        return gr.Slider(self.low, self.high, step=1 if self.kind is int else 0.01, **options)

    @property
    def is_text(self) -> bool:
        """Whether one value is written, not chosen: a text, or a number that may be left out, which no slider can show."""
        return self.kind is str or self.default is None or self.low is None or self.high is None

    @property
    def is_wide(self) -> bool:
        """Whether its component needs the width of a fold: a picture, buttons, or a slider with its description."""
        if choices := self._choices():
            return len(choices) <= MOST_BUTTONS
        return self.is_file or not (self.is_text or self.kind is bool)

    def _choices(self) -> list[Any]:
        if self.kind is int and not self.many and not self.is_text and self.high - self.low < MOST_BUTTONS:
            return list(range(self.low, self.high + 1))
        return list(self.choices)

    def _file(self, options: dict[str, Any]) -> "Component":
        """Files reach the page byte for byte, so that their checksums are those of what the user has."""
        import gradio as gr

        if self.many:
            return gr.Gallery(
                type="filepath", file_types=["image"], columns=4, height=200, allow_preview=False, buttons=[], **options
            )
        return gr.Image(
            type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260, buttons=[], **options
        )

    def shown(self, value: Any) -> Any:
        """An input's value as its component's."""
        if self.is_file:
            return [str(one) for one in value or ()] if self.many else (str(value) if value else None)
        if self.many:
            return ("\n" if self.kind is str else ", ").join(map(str, value or ()))
        return ("" if value is None else str(value)) if self.is_text and self.kind is not bool else value

    def given(self, value: Any) -> Any:
        """A component's value as the input's. What cannot be the input's kind is left as it is, for `check_inputs`."""
        if self.is_file:
            if self.many:
                return [cog.Path(path) for path, _ in value] if value else None
            return cog.Path(value) if value else None
        if self.many:
            texts = [text.strip() for text in SEPARATORS[self.kind].split(value or "") if text.strip()]
            return [self._number(text) for text in texts] or None
        if self.kind in (int, float):
            return None if value in (None, "") else self._number(value)
        return value or "" if self.kind is str and self.default is not None else value

    def _number(self, value: Any) -> Any:
        if self.kind is str:
            return value
        try:
            number = float(value)
        except ValueError:
            return value
        return int(number) if number.is_integer() and (self.kind is int or isinstance(value, int)) else number


def read_fields() -> dict[str, Field]:
    """The fields by name, in the order of the signature."""
    found = {}
    for name, parameter in inspect.signature(Predictor.run).parameters.items():
        if name in NOT_SHOWN:
            continue
        kind, many = unwrapped(parameter.annotation)
        said = parameter.default
        found[name] = Field(
            name, kind, many, said.description, said.default, said.ge, said.le, tuple(said.choices or ())
        )
    return found


def unwrapped(annotation: Any) -> tuple[type, bool]:
    """The kind that an annotation names, without None, and whether it is a list of it."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (one for one in typing.get_args(annotation) if one is not types.NoneType)
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def inputs_of(fields: Mapping[str, Field], values: Mapping[str, Any], recalled: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that a form says.

    Args:
        fields: from `read_fields`.
        values: the components' values, by name.
        recalled: inputs that a file's record names. What the user left as the file says is passed exactly as it is there,
            1 or 1.0, so that the same settings make the same bytes.

    Returns:
        Values by name, in the order of the signature.
    """
    given = {}
    for name, field in fields.items():
        value = field.given(values[name])
        given[name] = recalled[name] if name in recalled and not field.is_file and recalled[name] == value else value
    return given


def named_in(fields: Mapping[str, Field], error: str) -> str | None:
    """The name of the field that an error is about: errors begin with it. None: none."""
    name = re.match(r"\w*", error)[0]
    return name if name in fields else None


def fold_for(name: str) -> str:
    """The title of the fold that an input is in: that of the longest beginning of its name, else the first."""
    beginnings = {beginning: title for title, each in FOLDS.items() for beginning in each if name.startswith(beginning)}
    return beginnings[max(beginnings, key=len)] if beginnings else next(iter(FOLDS))
