"""Limits of inputs, and the errors for values outside of them."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.limits import LIMITS, InputError, Limits, counted, shown

NUMBERS = {name: limits for name, limits in LIMITS.items() if limits.kind in (int, float) and limits.most is None}
BOUNDED = {name: limits for name, limits in NUMBERS.items() if limits.low is not None}

anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=400)
    | st.binary(max_size=400)
    | st.lists(st.integers() | st.text(), max_size=50)
    | st.dictionaries(st.text(), st.lists(st.text()), max_size=5)
    | st.sampled_from(
        [object(), Image, np.zeros((3, 1000)), torch.zeros(2, 2), Image.new("L", (3, 4)), 10**5000, range(9)]
    )
)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=settings.default.max_examples // 4)
@given(data=st.data())
def test_numbers_within_the_bounds(name: str, data: st.DataObject) -> None:
    limits = LIMITS[name]
    value = data.draw(st.integers(limits.low, limits.high))
    values = [value, float(value), np.int64(value), np.float32(value), np.uint16(value), Fraction(value)]
    if limits.kind is float:
        values.append(data.draw(st.floats(limits.low, limits.high)))
    for one in values:
        found = limits.check(name, one)
        assert found == one
        assert type(found) is limits.kind


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=settings.default.max_examples // 4)
@given(
    value=st.integers().filter(lambda x: not 0 <= x < 2**32)
    | st.floats().filter(lambda x: not 0 <= x < 2**32)
    | st.text(max_size=20)
    | st.booleans()
    | st.sampled_from([np.bool_(True), np.float64("nan"), 10**400, Fraction(10**400), 1j, torch.tensor(1)])
)
def test_everything_else_is_no_number(name: str, value: Any) -> None:
    limits = LIMITS[name]
    word = "number" if limits.kind is float else "whole number"
    with pytest.raises(InputError) as caught:
        limits.check(name, value)
    assert str(caught.value) == f"{name} is {shown(value)}; it must be a {word} from {limits.low} to {limits.high}."


@pytest.mark.parametrize("name", LIMITS)
@settings(max_examples=settings.default.max_examples // 4)
@given(value=anything)
def test_any_value_is_one_of_its_kind_or_one_sentence(name: str, value: Any) -> None:
    limits = LIMITS[name]
    try:
        found = limits.check(name, value)
    except InputError as error:
        said = str(error)
        assert said.startswith(name)
        assert len(said) < 300
        assert "\n" not in said
        assert said.endswith(".")
    else:
        assert isinstance(found, tuple if limits.most else limits.kind | None)
        assert limits.check(name, found) == found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 10_000, 60),
        ([["x" * 100] * 100] * 100, 80),
        pytest.param(10**5000, "a value of the type int", id="long"),
        (np.zeros((64, 64, 3)), "an array of the shape (64, 64, 3)"),
        (torch.zeros(2, 3), "an array of the shape (2, 3)"),
        (np.float32(2.5), "2.5"),
        (Image.new("RGB", (7, 9)), "an image of 7x9 pixels"),
        ("two\nlines", r"'two\nlines'"),
        (None, "None"),
    ],
)
def test_values_are_shown_in_a_few_words(value: Any, text: str | int) -> None:
    if isinstance(text, int):
        assert len(shown(value)) <= text
        assert "..." in shown(value)
    else:
        assert shown(value) == text


@pytest.mark.parametrize(
    ("limits", "value", "sentence"),
    [
        (Limits(int, low=1, high=4), 5, "x is 5; it must be a whole number from 1 to 4."),
        (Limits(int, low=1), 0, "x is 0; it must be a whole number of at least 1."),
        (Limits(int), 1.5, "x is 1.5; it must be a whole number."),
        (Limits(int, 1), None, "x is None; it must be a whole number."),
        (Limits(bool, False), 1, "x is 1; it must be true or false."),
        (Limits(str, "a", choices=("a", "b")), "c", "x is 'c'; it must be one of a, b."),
        (Limits(float, low=0, high=2, most=4), 1, "x is 1; it must be a list of up to 4 numbers from 0 to 2."),
        (Limits(int, low=0, fewest=4, most=4), "1", "x is '1'; it must be a list of 4 whole numbers of at least 0."),
        (Limits(str, choices=("a", "b"), most=2), "a", "x is 'a'; it must be a list of up to 2 of a, b."),
        (Limits(str, choices=("a", "b"), most=2), ["a", "c"], "x[1] is 'c'; it must be one of a, b."),
        (Limits(int, fewest=4, most=4), [1], "x has 1 value; it must have 4."),
        (Limits(int, most=2), [1, 2, 3], "x has 3 values; it may have at most 2."),
        (Limits(Image.Image, most=2), [1, 2, 3], "x has 3 images; it may have at most 2."),
    ],
)
def test_sentences(limits: Limits, value: Any, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        limits.check("x", value)
    assert str(caught.value) == sentence


def test_lists_that_are_left_out() -> None:
    for name in ("outpaint", "control_types", "image_prompts"):
        assert LIMITS[name].check(name, None) == LIMITS[name].check(name, []) == LIMITS[name].check(name, ()) == ()


def test_counted() -> None:
    assert (counted(1, "value"), counted(2, "value"), counted(0, "value")) == ("1 value", "2 values", "0 values")


def test_texts_have_a_length() -> None:
    assert LIMITS["prompt"].check("prompt", "é" * 10_000) == "é" * 10_000
    with pytest.raises(InputError, match=r"^negative_prompt has 10,001 characters; it may have at most 10,000\.$"):
        LIMITS["negative_prompt"].check("negative_prompt", "é" * 10_001)
