"""Plans of scenes as numpy arrays, sampled from a seed; and the combinations that training never shows.

A plan holds one or two drawings with their places and sizes, a background, and what its caption mentions. What a caption does
not mention has a default (centre, `DEFAULT_SIZE`, white background), so that the text determines the picture. Only an unmentioned
style varies: it is the first one with probability `DEFAULT_STYLE_SHARE`, otherwise any, so that seeds of one prompt differ.

`compose` makes the pictures of plans, `captions` their captions.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

Split = Literal["train", "heldout"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (222, 40, 40),
    "orange": (250, 145, 30),
    "yellow": (255, 220, 50),
    "green": (70, 175, 70),
    "dark green": (15, 80, 45),
    "turquoise": (50, 190, 185),
    "light blue": (155, 210, 250),
    "blue": (40, 95, 225),
    "dark blue": (20, 30, 100),
    "purple": (130, 60, 185),
    "pink": (250, 150, 195),
    "brown": (125, 75, 40),
    "beige": (235, 215, 180),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
"""Background colours by name, 8-bit RGB. White is the default, and is never held out."""
COLOUR_NAMES = tuple(COLOURS)

PLACES: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
"""Places by name: the direction in which an object is pushed from the centre, as far as `MARGIN` allows."""
PLACE_NAMES = tuple(PLACES)

SIZES = {"small": 0.34, "large": 0.82}
SIZE_NAMES = tuple(SIZES)
DEFAULT_SIZE = 0.62
"""Longer side of an object, as a share of the picture's."""
PLACED_SIZE = 0.46
"""Size of an object whose place is named, but not its size."""
PAIR_SIZE = 0.44
MARGIN = 0.04

RELATIONS = ("next to", "left of", "right of", "above", "below")
"""Where the first of two objects is, seen from the second one; "next to" is drawn as "left of"."""
_RELATION_WAYS = np.array([(-1, 0), (-1, 0), (1, 0), (0, -1), (0, 1)], np.float32)

GRADIENT_WAYS = ("top to bottom", "left to right")

PAIR_SHARE = 0.4
DEFAULT_STYLE_SHARE = 0.6
HELD_OUT_PERCENT = 15
_MENTION_SHARES = {"style": 0.45, "place": 0.28, "size": 0.28, "background": 0.85, "gradient": 0.18}


@dataclass
class Plans:
    """n scenes as arrays. `objects`, `styles`, `centres` and `sizes` have two slots, of which the second may be empty.

    `Plans.of` computes `centres` and `sizes` from the rest.

    Attributes:
        objects: int64 (n, 2), object indices; -1 for none.
        styles: int64 (n, 2), style indices.
        centres: float32 (n, 2, 2), x and y of each object's centre, as shares of the picture's side.
        sizes: float32 (n, 2), each object's longer side, as a share of the picture's.
        colours: int64 (n, 2), indices into `COLOUR_NAMES`: a gradient's start and end, the same for a plain one.
        gradient_ways: int64 (n,), index into `GRADIENT_WAYS`.
        relations: int64 (n,), index into `RELATIONS`; -1 for one object.
        places: int64 (n,), index into `PLACE_NAMES`.
        size_names: int64 (n,), index into `SIZE_NAMES`; -1 for a default size.
        says_style, says_background: bool (n,), whether the caption names them. It names places and sizes that are not default.
    """

    objects: np.ndarray
    styles: np.ndarray
    centres: np.ndarray
    sizes: np.ndarray
    colours: np.ndarray
    gradient_ways: np.ndarray
    relations: np.ndarray
    places: np.ndarray
    size_names: np.ndarray
    says_style: np.ndarray
    says_background: np.ndarray

    @classmethod
    def of(
        cls,
        objects: np.ndarray,
        styles: np.ndarray,
        colours: np.ndarray,
        gradient_ways: np.ndarray,
        relations: np.ndarray,
        places: np.ndarray,
        size_names: np.ndarray,
        says_style: np.ndarray,
        says_background: np.ndarray,
    ) -> "Plans":
        """Plans whose centres and sizes follow from relations, places and size names."""
        two = objects[:, 1] >= 0
        default = np.where(two, PAIR_SIZE, np.where(places > 0, PLACED_SIZE, DEFAULT_SIZE))
        size = np.where(size_names >= 0, np.array(list(SIZES.values()))[size_names], default)
        way = np.where(two[:, None], _RELATION_WAYS[relations], np.array(list(PLACES.values()))[places])
        pushed = way * (0.5 - MARGIN - size / 2)[:, None]
        return cls(
            objects=objects,
            styles=styles,
            centres=(0.5 + np.stack([pushed, -pushed], 1)).astype(np.float32),
            sizes=np.stack([size, size], 1).astype(np.float32),
            colours=colours,
            gradient_ways=gradient_ways,
            relations=relations,
            places=places,
            size_names=size_names,
            says_style=says_style,
            says_background=says_background,
        )

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, rows: slice | np.ndarray | Sequence[int]) -> "Plans":
        """The plans of ``rows``: a slice, an index array or a mask."""
        return Plans(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _mix(values: np.ndarray) -> np.ndarray:
    """Scrambles uint64 values by the finaliser of splitmix64, so that nearby inputs give unrelated outputs."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashes(names: Sequence[str]) -> np.ndarray:
    return _mix(np.array([zlib.crc32(name.encode()) for name in names], np.uint64))


@dataclass(frozen=True)
class HeldOut:
    """The combinations that training never shows, chosen by hashes of their names.

    Attributes:
        colours: bool (objects, colours), whether an object is never shown on a background colour; False for white.
        pairs: bool (objects, objects), symmetric, whether two objects are never shown together; True on the diagonal.
    """

    colours: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str]) -> "HeldOut":
        """The held-out combinations of objects of these ``names``. Whether a pair is held out does not depend on other names."""
        objects, colours = _hashes(names), _hashes([f"on {name}" for name in COLOUR_NAMES])
        with np.errstate(over="ignore"):
            by_colour = _mix(objects[:, None] + colours[None]) % np.uint64(100) < HELD_OUT_PERCENT
            by_pair = _mix(objects[:, None] + objects[None]) % np.uint64(100) < HELD_OUT_PERCENT
        by_colour[:, COLOUR_NAMES.index("white")] = False
        np.fill_diagonal(by_pair, True)
        return cls(by_colour, by_pair)


def _contents_allowed(plans: Plans, held_out: HeldOut, split: Split) -> np.ndarray:
    """bool (n,): whether ``split`` may show each plan."""
    first, second = plans.objects.T
    two = second >= 0
    on_held_out = held_out.colours[first[:, None], plans.colours].any(1)
    on_held_out |= two & held_out.colours[second[:, None], plans.colours].any(1)
    pair_held_out = two & held_out.pairs[first, second]
    if split == "train":
        return ~on_held_out & ~pair_held_out
    return np.where(two, pair_held_out & (first != second), on_held_out)


def _draw(n: int, n_objects: int, n_styles: int, rng: np.random.Generator, split: Split) -> Plans:
    chance = {name: rng.random(n) < share for name, share in _MENTION_SHARES.items()}
    two = rng.random(n) < PAIR_SHARE
    objects = rng.integers(n_objects, size=(n, 2))
    objects[~two, 1] = -1

    plain_style = np.where(rng.random(n) < DEFAULT_STYLE_SHARE, 0, rng.integers(n_styles, size=n))
    style = np.where(chance["style"], rng.integers(n_styles, size=n), plain_style)

    says_background = chance["background"] | (split == "heldout")
    colours = rng.integers(len(COLOUR_NAMES), size=(n, 2))
    colours[~says_background] = COLOUR_NAMES.index("white")
    solid = ~chance["gradient"] | ~says_background
    colours[solid, 1] = colours[solid, 0]

    places = np.where(chance["place"] & ~two, rng.integers(1, len(PLACE_NAMES), size=n), 0)
    size_names = np.where(chance["size"] & ~two, rng.integers(len(SIZE_NAMES), size=n), -1)
    # A large object fits only in the centre.
    places[size_names == SIZE_NAMES.index("large")] = 0
    return Plans.of(
        objects=objects,
        styles=np.stack([style, style], 1),
        colours=colours,
        gradient_ways=rng.integers(len(GRADIENT_WAYS), size=n),
        relations=np.where(two, rng.integers(len(RELATIONS), size=n), -1),
        places=places,
        size_names=size_names,
        says_style=chance["style"],
        says_background=says_background,
    )


def elsewhere(plans: Plans, names: Sequence[str], seed: int) -> Plans:
    """The objects of `plans` in their styles, each in another scene: place, size, relation and background are drawn again.

    Backgrounds of held-out pairs (`HeldOut`) become white.
    """
    n, rng, two = len(plans), np.random.default_rng(seed), plans.objects[:, 1] >= 0
    colours = rng.integers(len(COLOUR_NAMES), size=(n, 2))
    solid = rng.random(n) >= _MENTION_SHARES["gradient"]
    colours[solid, 1] = colours[solid, 0]
    held_out = HeldOut.of(names).colours
    never = held_out[plans.objects[:, :1], colours].any(1) | (two & held_out[plans.objects[:, 1:], colours].any(1))
    colours[never] = COLOUR_NAMES.index("white")
    size_names = np.where(two, -1, rng.integers(-1, len(SIZE_NAMES), size=n))
    places = np.where(two, 0, rng.integers(len(PLACE_NAMES), size=n))
    places[size_names == SIZE_NAMES.index("large")] = 0
    return Plans.of(
        objects=plans.objects,
        styles=plans.styles,
        colours=colours,
        gradient_ways=rng.integers(len(GRADIENT_WAYS), size=n),
        relations=np.where(two, rng.integers(len(RELATIONS), size=n), -1),
        places=places,
        size_names=size_names,
        says_style=plans.says_style,
        says_background=np.ones(n, bool),
    )


def with_other_objects(plans: Plans, chosen: np.ndarray, n_objects: int, seed: int) -> Plans:
    """Plans of which those that are `chosen`, bool (n,), show any other objects, in the same style."""
    rng = np.random.default_rng(seed)
    others = (plans.objects + rng.integers(1, n_objects, size=plans.objects.shape)) % n_objects
    return replace(plans, objects=np.where(chosen[:, None] & (plans.objects >= 0), others, plans.objects))


def sample_plans(n: int, names: Sequence[str], seed: int, split: Split = "train", n_styles: int = 3) -> Plans:
    """Samples ``n`` plans of objects ``names``; equal arguments give equal plans.

    The split "train" avoids the held-out combinations (`HeldOut`). In "heldout", every scene has one: an object on a background
    colour, or two objects, that training never shows together.
    """
    held_out = HeldOut.of(names)
    rng = np.random.default_rng(seed)
    share = {"train": 0.7, "heldout": 0.14}[split]
    parts, missing = [], n
    while missing > 0:
        drawn = _draw(int(missing / share) + 16, len(names), n_styles, rng, split)
        parts.append(drawn[_contents_allowed(drawn, held_out, split)][:missing])
        missing -= len(parts[-1])
    return Plans(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Plans)}
    )
