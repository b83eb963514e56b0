r"""Weights in prompts: `(words)`, `((words))`, `(words:1.3)`, in ComfyUI's syntax (comfy/sd1_clip.py, `token_weights`).

- `(words)` multiplies the weight outside of the brackets by 1.1.
- `(words:1.3)` sets the weight to 1.3, whatever the weight outside is. The number follows the last colon, in any form that
  Python's `float` takes. A colon that no number follows is text.
- `\(` and `\)` are brackets that are text.
- An opening bracket that is never closed is text, and so is all that follows it. After a closing bracket that was never
  opened, the next `(` and its `)` are text.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from cascade.limits import InputError, shown

MULTIPLIER = 1.1
# ComfyUI has no limits. The formula extrapolates: at weights above 2, hidden states are unlike those of Stage C's training.
LOWEST, HIGHEST = -4.0, 4.0

_BRACKET = re.compile(r"(?<!\\)[()]")


class Part(NamedTuple):
    """Some of a prompt's text, which has one weight.

    Attributes:
        text: without the brackets that gave the weight; escaped brackets without their backslashes.
        weight: any float, nan and infinity included. `check_weights` refuses those that are not allowed.
        places: for each character of `text`, its index in the prompt.
        source: (start, stop) in the prompt of the innermost brackets around the part, or of the part if it has none.
    """

    text: str
    weight: float
    places: Sequence[int]
    source: tuple[int, int]


def whole(prompt: str) -> list[Part]:
    """The unchanged prompt as one part of weight 1."""
    return [Part(prompt, 1.0, range(len(prompt)), (0, len(prompt)))]


def parse(prompt: str) -> list[Part]:
    """The parts of a prompt, in their order. Takes time in proportion to the prompt's length, however deep its brackets are
    nested.
    """
    brackets = {match.start(): match.group() for match in _BRACKET.finditer(prompt)}
    pairs = _pairs(brackets)
    parts = []
    waiting = [(start, stop, 1.0, (start, stop)) for start, stop in _cut(brackets, pairs, 0, len(prompt))][::-1]
    while waiting:
        start, stop, weight, source = waiting.pop()
        if stop - start < 2 or brackets.get(start) != "(" or brackets.get(stop - 1) != ")":
            parts.append(_part(prompt, start, stop, weight, source))
            continue
        first, last, weight = _weighted(prompt, start + 1, stop - 1, weight)
        inner = [(*span, weight, (start, stop)) for span in _cut(brackets, pairs, first, last)]
        waiting.extend(reversed(inner))
    return parts


def check_weights(name: str, prompt: str) -> None:
    """Make sure that all weights of a prompt lie between -4 and 4.

    Args:
        name: of the input, for the error.

    Raises:
        InputError: a weight does not. The error quotes the first one.
    """
    for part in parse(prompt):
        if part.text.strip() and not LOWEST <= part.weight <= HIGHEST:  # nan is refused, too
            start, stop = part.source
            number = "not a number" if math.isnan(part.weight) else f"{part.weight:.4g}"
            if number.lstrip("-") == f"{HIGHEST:g}":  # 4.000001
                number = repr(part.weight)
            raise InputError(
                f"{name} has the weight {number} at character {start}, in {shown(prompt[start:stop])}; a weight must lie "
                f"between {LOWEST:g} and {HIGHEST:g}, and brackets that are text are written \\( and \\)."
            )


def _pairs(brackets: Mapping[int, str]) -> dict[int, int]:
    """For each opening bracket that is closed, the index of the closing one."""
    pairs, opened = {}, []
    for index, bracket in brackets.items():
        if bracket == "(":
            opened.append(index)
        elif opened:
            pairs[opened.pop()] = index
    return pairs


def _cut(brackets: Mapping[int, str], pairs: Mapping[int, int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a stretch of the prompt at its outermost brackets: into groups with their brackets, and the texts between them."""
    surplus = 0  # closing brackets without an opening one
    text = index = start
    while index < stop:
        bracket = brackets.get(index)
        if bracket == ")":
            surplus += 1
        elif bracket == "(" and surplus:
            surplus -= 1
        elif bracket == "(":
            if text < index:
                yield text, index
            text = index
            index = pairs.get(index, stop)
            if index >= stop:  # closed outside of this stretch, or never
                break
            yield text, index + 1
            text = index + 1
        index += 1
    if text < stop:
        yield text, stop


def _weighted(prompt: str, start: int, stop: int, weight: float) -> tuple[int, int, float]:
    """The content of a group's brackets, from `start` to before `stop`: the stretch without its number, and the weight."""
    colon = prompt.rfind(":", start, stop)
    if colon > start:
        try:
            return start, colon, float(prompt[colon + 1 : stop])
        except ValueError:
            pass
    return start, stop, weight * MULTIPLIER


def _part(prompt: str, start: int, stop: int, weight: float, source: tuple[int, int]) -> Part:
    escaped = {match.start() for match in re.finditer(r"\\[()]", prompt[start:stop])}
    places = [start + place for place in range(stop - start) if place not in escaped]
    return Part("".join(prompt[place] for place in places), weight, places, source)
