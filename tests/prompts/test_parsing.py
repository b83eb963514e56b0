"""Weights in prompts, against a plain reading of ComfyUI's rules and by properties."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.limits import InputError
from cascade.prompts.parsing import check_weights, parse, whole

# Mostly what matters to the parser.
prompts = st.text(st.sampled_from("()()\\::.123 ab") | st.characters(exclude_categories=["Cs"]), max_size=40)
words = st.text("abc ,.", max_size=8)
weights = st.floats(-4, 4).map(lambda weight: round(weight, 3))


def simple(prompt: str) -> list[tuple[str, float]]:
    """The rules, one after the other, without care for time or places: what `parse` must come to."""
    opening, closing = "\ue000", "\ue001"
    hidden = prompt.replace("\\)", closing).replace("\\(", opening)

    def groups(text: str) -> list[str]:
        found, item, depth = [], "", 0
        for letter in text:
            if letter == "(" and depth == 0 and item:
                found.append(item)
                item = ""
            item += letter
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if letter == ")" and depth == 0:
                found.append(item)
                item = ""
        return [*found, item] if item else found

    def weighted(text: str, weight: float) -> list[tuple[str, float]]:
        found = []
        for group in groups(text):
            if len(group) < 2 or group[0] != "(" or group[-1] != ")":
                found.append((group, weight))
                continue
            inner, new = group[1:-1], weight * 1.1
            head, colon, number = inner.rpartition(":")
            if colon and head:
                try:
                    inner, new = head, float(number)
                except ValueError:
                    inner = group[1:-1]
            found.extend(weighted(inner, new))
        return found

    return [(text.replace(opening, "(").replace(closing, ")"), weight) for text, weight in weighted(hidden, 1.0)]


def parsed(prompt: str) -> list[tuple[str, float]]:
    return [(part.text, part.weight) for part in parse(prompt)]


def same(actual: list[tuple[str, float]], expected: list[tuple[str, float]]) -> bool:
    return [text for text, _ in actual] == [text for text, _ in expected] and all(
        one == other or (math.isnan(one) and math.isnan(other))
        for (_, one), (_, other) in zip(actual, expected, strict=True)
    )


@given(prompts.filter(lambda prompt: not {"\ue000", "\ue001"} & set(prompt)))
def test_the_rules(prompt: str) -> None:
    assert same(parsed(prompt), simple(prompt))


@given(prompts)
def test_parts_say_where_they_are_from(prompt: str) -> None:
    end = 0
    for part in parse(prompt):
        assert "".join(prompt[place] for place in part.places) == part.text
        assert list(part.places) == sorted(set(part.places))
        assert part.text == "" or part.places[0] >= end
        end = part.places[-1] + 1 if part.text else end
        start, stop = part.source
        assert 0 <= start <= stop <= len(prompt)
        assert all(start <= place < stop for place in part.places)


@given(prompts.filter(lambda prompt: "(" not in prompt))
def test_without_an_opening_bracket_all_is_text_of_weight_1(prompt: str) -> None:
    text = "".join(part.text for part in parse(prompt))
    assert text == prompt.replace("\\)", ")")
    assert {part.weight for part in parse(prompt)} <= {1.0}


@given(prompts)
def test_escaped_brackets_are_text(prompt: str) -> None:
    bare = prompt.replace("\\", "")
    escaped = bare.replace("(", "\\(").replace(")", "\\)")
    assert parsed(escaped) == ([(bare, 1.0)] if bare else [])


@given(words, words.filter(str.strip), weights, words)
def test_a_number_is_the_weight(before: str, inside: str, weight: float, after: str) -> None:
    expected = [(text, number) for text, number in ((before, 1.0), (inside, weight), (after, 1.0)) if text]
    assert parsed(f"{before}({inside}:{weight}){after}") == expected


@given(words.filter(str.strip), st.integers(0, 14))
def test_brackets_multiply(inside: str, depth: int) -> None:
    ((text, weight),) = parsed("(" * depth + inside + ")" * depth)
    assert (text, round(weight, 9)) == (inside, round(1.1**depth, 9))


@given(weights, weights, words.filter(str.strip))
def test_an_inner_number_replaces_the_outer_one(outer: float, inner: float, text: str) -> None:
    assert parsed(f"(({text}:{inner}):{outer})") == [(text, inner)]


@pytest.mark.parametrize(
    "prompt",
    ["(" * 5000 + ")" * 5000, "(a:1" * 2500, "((a)" * 3333, "(" * 5000 + "(a)" * 1666, ")(" * 5000, "\\(" * 5000],
)
def test_time_grows_with_the_length_only(prompt: str) -> None:
    start = time.process_time()
    parse(prompt)
    assert time.process_time() - start < 1


def test_without_weighting_brackets_are_text() -> None:
    (part,) = whole("a (red:1.3) \\(apple\\)")
    assert (part.text, part.weight) == ("a (red:1.3) \\(apple\\)", 1.0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("by (meet at 12:30) at", "has the weight 30 at character 3, in '(meet at 12:30)'; "),
        ("(a:nan)", "has the weight not a number at character 0, in '(a:nan)'; "),
        ("a ((b) c:inf)", "has the weight inf at character 3, in '(b)'; "),
        ("(a:-4.001)", "has the weight -4.001 at character 0, "),
        ("(a:4.000001)", "has the weight 4.000001 at character 0, "),
        ("(" * 15 + "a" + ")" * 15, "has the weight 4.177 at character 14, in '(a)'; "),
        (r"(\(a\):5)", r"has the weight 5 at character 0, in '(\\(a\\):5)'; "),
    ],
)
def test_weights_out_of_range_are_quoted(prompt: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_weights("negative_prompt", prompt)
    assert str(error.value).startswith(f"negative_prompt {message}")
    assert str(error.value).endswith(
        "a weight must lie between -4 and 4, and brackets that are text are written \\( and \\)."
    )


@pytest.mark.parametrize("prompt", ["(a:4) (b:-4) (c:0)", "((a:1):30)", "( :30)", r"\(a:30\)", "(a:30", "(a:30) "[:5]])
def test_weights_that_are_allowed(prompt: str) -> None:
    check_weights("prompt", prompt)
