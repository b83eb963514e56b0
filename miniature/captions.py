"""Captions of plans, in many wordings. One core writes some 150,000 a second."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from miniature.scenes import (
    COLOUR_NAMES,
    GRADIENT_WAYS,
    PLACE_NAMES,
    RELATIONS,
    SIZE_NAMES,
    Plans,
)

STYLE_PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cartoon": (("cartoon", "cartoon style"), ("in cartoon style", "as a cartoon", "in a cartoon style")),
    "3D": (("3D", "glossy 3D"), ("in 3D style", "in glossy 3D style", "in 3D")),
    "flat": (("flat", "flat style"), ("in flat style", "in a flat style", "as a flat icon")),
    "ink": (("ink", "ink style"), ("in ink style", "in black ink", "as an ink drawing")),  # of a LoRA, see `loras`
}
"""Of each style, the words before an object and the words after it."""

SMALL = ("small", "little", "tiny")
LARGE = ("large", "big", "huge")
PLACE_PHRASES = {
    name: ("in the center", "in the middle")
    if name == "center"
    else (f"at the {name}", f"in the {name} corner", f"in the {name}")
    if " " in name
    else (f"at the {name}", f"on the {name} side" if name in ("left", "right") else f"near the {name}")
    for name in PLACE_NAMES
}
PREFIXES = ("a picture of ", "an image of ", "a drawing of ", "an icon of ")

RELATION_PHRASES = {
    "next to": ("{} next to {}", "{} beside {}", "{} and {}", "{} and {} side by side"),
    "left of": ("{} to the left of {}", "{} left of {}", "{} on the left and {} on the right"),
    "right of": ("{} to the right of {}", "{} right of {}"),
    "above": ("{} above {}", "{} over {}"),
    "below": ("{} below {}", "{} under {}"),
}

_NO_ARTICLE = {
    *(
        "bacon",
        "bread",
        "broccoli",
        "butter",
        "candy",
        "canned food",
        "cooked rice",
        "coral",
        "corn",
        "curry rice",
        "fire",
    ),
    *("fog", "fondue", "garlic", "hundred points", "leafy green", "luggage", "meat", "milky way", "mount fuji"),
    *("mrs. claus", "oden", "people hugging", "popcorn", "salad", "santa claus", "shaved ice", "spaghetti", "steak"),
    *("sushi", "toilet paper", "tokyo tower"),
}
_SINGULAR_S = {
    *("abacus", "bus", "cactus", "claus", "compass", "fleur-de-lis", "hibiscus", "hippopotamus", "lotus", "minibus"),
    *("octopus", "rhinoceros", "trolleybus"),
}
_HEAD_ENDS = (
    " with ",
    " of ",
    " in ",
    " on ",
    " covering ",
    " playing ",
    " facing ",
    " under ",
    " from ",
    " for ",
    " pointing ",
    " holding ",
    " lifting ",
    " over ",
)
_AN_AFTER_ALL = ("hour", "mri", "sos", "x-ray", "suv")
_A_AFTER_ALL = ("uni", "ufo", "one", "eu", "use")


def article(name: str, before: str = "") -> str:
    """``before + name`` with "a" or "an", or with no article for plurals ("glasses"), substances ("bread") and proper names.

    ``before`` holds adjectives, each followed by a space.
    """
    phrase = before + name
    if _bare(name):
        return phrase
    start = phrase.lower()
    vowel = start.startswith(_AN_AFTER_ALL) or (start[0] in "aeiou" and not start.startswith(_A_AFTER_ALL))
    return f"{'an' if vowel else 'a'} {phrase}"


@cache
def _bare(name: str) -> bool:
    """Whether a name has no article."""
    head = name.lower()
    for end in _HEAD_ENDS:
        head = head.split(end, 1)[0]
    last = head.rsplit(" ", 1)[-1]
    plural = last.endswith("s") and not last.endswith("ss") and last not in _SINGULAR_S
    return plural or head in _NO_ARTICLE


class Captioner:
    """Writes captions of plans.

    Args:
        names: the objects' names.
        styles: the styles' names, keys of `STYLE_PHRASES`.
        also: further names of an object, by its name.
    """

    def __init__(self, names: Sequence[str], styles: Sequence[str], also: Mapping[str, Sequence[str]] | None = None):
        self.styles = [STYLE_PHRASES[style] for style in styles]
        others = also or {}
        # The first name is three times as likely as each other one.
        self.names = [(name, name, name, *others.get(name, ())) for name in names]

    def captions(self, plans: Plans, rng: random.Random) -> list[str]:
        """One caption for each plan, in a wording that ``rng`` chooses."""
        columns = (
            plans.objects.tolist(),
            plans.styles.tolist(),
            plans.colours.tolist(),
            plans.gradient_ways.tolist(),
            plans.relations.tolist(),
            plans.places.tolist(),
            plans.size_names.tolist(),
            plans.says_style.tolist(),
            plans.says_background.tolist(),
        )
        return [self._caption(rng.random, *row) for row in zip(*columns, strict=True)]

    def backgrounds(self, plans: Plans, rng: random.Random) -> list[str]:
        """One caption for every plan that names its background alone, or nothing if the plan does not say it."""
        rows = zip(plans.colours.tolist(), plans.gradient_ways.tolist(), plans.says_background.tolist(), strict=True)
        return [article(_background(colours, way, rng.random)) if says else "" for colours, way, says in rows]

    def _caption(
        self,
        chance: Callable[[], float],
        objects: list[int],
        styles: list[int],
        colours: list[int],
        gradient_way: int,
        relation: int,
        place: int,
        size: int,
        says_style: bool,
        says_background: bool,
    ) -> str:
        first = _pick(self.names[objects[0]], chance)
        before, after = self.styles[styles[0]]
        adjectives = ""
        tail = ""
        if size >= 0:
            adjectives = _pick(SMALL if SIZE_NAMES[size] == "small" else LARGE, chance) + " "
        if says_style:
            if relation < 0 and chance() < 0.5:
                adjectives += _pick(before, chance) + " "
            else:
                tail = " " + _pick(after, chance)
        if relation >= 0:
            second = _pick(self.names[objects[1]], chance)
            pattern = _pick(RELATION_PHRASES[RELATIONS[relation]], chance)
            subject = pattern.format(article(first), article(second))
        elif chance() < 0.25:
            subject = adjectives + first
        else:
            subject = article(first, adjectives)
            if chance() < 0.08:
                subject = _pick(PREFIXES, chance) + subject
        if place:
            where = " " + _pick(PLACE_PHRASES[PLACE_NAMES[place]], chance)
            tail = tail + where if chance() < 0.5 else where + tail
        if not says_background:
            return subject + tail
        ground = _background(colours, gradient_way, chance)
        how = chance()
        if how < 0.6:
            return f"{subject}{tail} on {article(ground)}"
        if how < 0.75:
            return f"{subject}{tail}, {ground}"
        if how < 0.85:
            return f"{subject}{tail} with {article(ground)}"
        if how < 0.95:
            return f"{subject}{tail} against {article(ground)}"
        return f"on {article(ground)}, {subject}{tail}"


def _background(colours: list[int], gradient_way: int, chance: Callable[[], float]) -> str:
    start, end = COLOUR_NAMES[colours[0]], COLOUR_NAMES[colours[1]]
    if start == end:
        return f"{start} background"
    if gradient_way:
        return f"{start} to {end} gradient from {GRADIENT_WAYS[gradient_way]}"
    return f"{start} to {end} gradient" + (" background" if chance() < 0.5 else "")


def _pick(choices: Sequence[str], chance: Callable[[], float]) -> str:
    # Four times as fast as random.choice.
    return choices[int(chance() * len(choices))]
