"""The form is that of `predict.py`, and says back what it was told."""

from pathlib import Path
from typing import Any

import cog
import pytest

from cascade.limits import LIMITS, InputError
from serving.inputs import PICTURES, check_inputs
from studio.fields import FOLDS, Field, fold_for, inputs_of, named_in, read_fields, unwrapped

FIELDS = read_fields()


def test_there_is_a_field_for_every_input() -> None:
    assert set(FIELDS) == set(LIMITS) - {"previews"}
    assert {name for name, one in FIELDS.items() if one.is_file} == set(PICTURES)
    assert {name for name, one in FIELDS.items() if one.many} == {
        n for n, one in LIMITS.items() if one.most is not None
    }


def test_every_input_has_a_fold() -> None:
    folds = {name: fold_for(name) for name in FIELDS}
    assert set(folds.values()) == set(FOLDS)
    assert folds["image"] == folds["mask"] == "Start from an image"
    assert folds["image_prompts"] == "Image prompts"
    assert fold_for("a_new_input") == "Settings"


def test_what_nobody_touched_is_what_everybody_gets() -> None:
    """The components' own defaults, read as a request, are the signature's defaults."""
    values = {name: one.component().value for name, one in FIELDS.items()}
    values |= {name: None for name, one in FIELDS.items() if one.is_file}
    given = inputs_of(FIELDS, values, {})
    assert check_inputs(given) == check_inputs({})
    assert given == {name: one.default for name, one in FIELDS.items()}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "two\nlines"),
        ("width", 96),
        ("num_images", 4),
        ("seed", 2**32 - 1),
        ("guidance_scale_prior", 7.25),
        ("output_quality", 0),
        ("prompt_weighting", True),
        ("aspect_ratio", "21:9"),
        ("outpaint", [0, 8, 16, 24]),
        ("control_types", ["canny", "inpainting"]),
        ("control_scales", [0.5, 1.0]),
        ("lora_weights", ["https://example.com/a,b.safetensors", "with blanks"]),
    ],
)
def test_a_value_is_shown_and_read_again(name: str, value: Any) -> None:
    assert FIELDS[name].given(FIELDS[name].shown(value)) == value


def test_files_are_passed_as_paths() -> None:
    assert FIELDS["image"].given("a.png") == cog.Path("a.png")
    assert FIELDS["image_prompts"].given([("a.png", None), ("b.png", None)]) == [cog.Path("a.png"), cog.Path("b.png")]
    assert FIELDS["image_prompts"].shown([Path("a.png")]) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("width", "wide", "width is 'wide'; it must be a whole number from 64 to 4096."),
        ("steps_prior", "2.5", "steps_prior is 2.5; it must be a whole number from 1 to 50."),
        ("outpaint", "1, 2", "outpaint has 2 values; it must have 4."),
        ("control_scales", "1, x", "control_scales[1] is 'x'; it must be a number from 0 to 2."),
    ],
)
def test_what_is_no_value_gets_the_error_of_the_service(name: str, text: str, error: str) -> None:
    values = {other: one.shown(one.default) for other, one in FIELDS.items()} | {"image_prompts": None}
    values |= {other: None for other, one in FIELDS.items() if one.is_file}
    with pytest.raises(InputError) as raised:
        check_inputs(inputs_of(FIELDS, values | {name: text}, {}))
    assert str(raised.value) == error
    assert named_in(FIELDS, error) == name


def test_what_a_file_says_is_passed_as_it_says_it() -> None:
    """1 and 1.0 are other bytes in the next file."""
    values = {name: None if one.is_file else one.shown(one.default) for name, one in FIELDS.items()}
    values["prompt_strength"] = 1
    (exact,) = (inputs_of(FIELDS, values, {"prompt_strength": 1.0})["prompt_strength"],)
    assert isinstance(exact, float)
    changed = inputs_of(FIELDS, values | {"prompt_strength": 0.5}, {"prompt_strength": 1.0})
    assert changed["prompt_strength"] == 0.5


def test_an_input_of_tomorrow_has_a_component() -> None:
    from gradio.components import Component

    for kind, many, choices in ((str, False, ("a", "b")), (int, True, ()), (float, False, ()), (bool, False, ())):
        one = Field("new", kind, many, "Says.", False if kind is bool else None, 0, 1, choices)
        assert isinstance(one.component(), Component)
    assert unwrapped(list[float] | None) == (float, True)
    assert unwrapped(bool) == (bool, False)
