"""Test prompts: drawn from a seed, half of them with combinations that training never shows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from miniature.captions import Captioner
from miniature.scenes import (
    COLOUR_NAMES,
    GRADIENT_WAYS,
    PLACE_NAMES,
    RELATIONS,
    SIZE_NAMES,
    Plans,
    Split,
    sample_plans,
)

PAIRS_SHARE = 2 / 7
"""Share of a set's prompts that name two objects: 200 of 700."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its picture must show.

    Attributes:
        text, seed: what the model is given.
        objects: one name, or two in the order in which `relation` names them.
        style, relation, size: words of `scenes`; None if the prompt does not name one. One object has no relation.
        colours: the background's colours at its start and end, equal for a plain one; None if not named.
        gradient_way: of `GRADIENT_WAYS`; None for a plain background.
        place: of `PLACE_NAMES`.
        unseen: whether this object on this background, or these two objects together, never occur in training.
    """

    text: str
    seed: int
    objects: tuple[str, ...]
    style: str | None
    relation: str | None
    size: str | None
    place: str
    colours: tuple[str, str] | None
    gradient_way: str | None
    unseen: bool


def make_prompts(
    names: Sequence[str], styles: Sequence[str], seed: int, count: int = 700, two: int | None = None
) -> list[Prompt]:
    """A set of test prompts; the same for the same arguments.

    Args:
        names, styles: of the drawings, see `icons.load_drawings`.
        seed: at least 0. Sets of neighbouring seeds have nothing in common, and share no random numbers with training.
        count: number of prompts, at least 4. First come those of one object, then those of two; of both kinds, the second
            half is unseen in training.
        two: how many name two objects; None: `PAIRS_SHARE` of them.
    """
    *plan_seeds, caption_seed, first_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(6))
    captioner, rng = Captioner(names, styles), random.Random(caption_seed)
    two = round(PAIRS_SHARE * count) if two is None else two
    kinds: list[tuple[bool, Split, int]] = [
        (False, "train", (count - two + 1) // 2),
        (False, "heldout", (count - two) // 2),
        (True, "train", (two + 1) // 2),
        (True, "heldout", two // 2),
    ]
    prompts: list[Prompt] = []
    for (wants_two, split, wanted), plan_seed in zip(kinds, plan_seeds, strict=True):
        # A quarter of the plans, at least, have two objects, and half of them one.
        plans = sample_plans(6 * wanted + 50, names, plan_seed, split, len(styles))
        plans = plans[(plans.objects[:, 1] >= 0) == wants_two][:wanted]
        for i, text in enumerate(captioner.captions(plans, rng)):
            picture_seed = first_seed + len(prompts)
            prompts.append(_prompt(text, picture_seed, plans, i, names, styles, split == "heldout"))
    return prompts


def _prompt(
    text: str, seed: int, plans: Plans, i: int, names: Sequence[str], styles: Sequence[str], unseen: bool
) -> Prompt:
    start, end = plans.colours[i]
    says_background = bool(plans.says_background[i])
    relation, size = plans.relations[i], plans.size_names[i]
    return Prompt(
        text=text,
        seed=seed,
        objects=tuple(names[index] for index in plans.objects[i] if index >= 0),
        style=styles[plans.styles[i, 0]] if plans.says_style[i] else None,
        relation=RELATIONS[relation] if relation >= 0 else None,
        size=SIZE_NAMES[size] if size >= 0 else None,
        place=PLACE_NAMES[plans.places[i]],
        colours=(COLOUR_NAMES[start], COLOUR_NAMES[end]) if says_background else None,
        gradient_way=GRADIENT_WAYS[plans.gradient_ways[i]] if says_background and start != end else None,
        unseen=unseen,
    )


def plans_of(prompts: Sequence[Prompt], names: Sequence[str], styles: Sequence[str]) -> Plans:
    """The scenes that prompts describe, in the first style if the prompt names none."""
    index = {name: i for i, name in enumerate(names)}
    colours = [p.colours or ("white", "white") for p in prompts]
    return Plans.of(
        objects=np.array([[index[name] for name in p.objects] + [-1] * (2 - len(p.objects)) for p in prompts]),
        styles=np.array([[styles.index(p.style) if p.style else 0] * 2 for p in prompts]),
        colours=np.array([[COLOUR_NAMES.index(name) for name in pair] for pair in colours]),
        gradient_ways=np.array([GRADIENT_WAYS.index(p.gradient_way) if p.gradient_way else 0 for p in prompts]),
        relations=np.array([RELATIONS.index(p.relation) if p.relation else -1 for p in prompts]),
        places=np.array([PLACE_NAMES.index(p.place) for p in prompts]),
        size_names=np.array([SIZE_NAMES.index(p.size) if p.size else -1 for p in prompts]),
        says_style=np.array([p.style is not None for p in prompts]),
        says_background=np.array([p.colours is not None for p in prompts]),
    )
