"""The measurement of what weights in prompts do."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from miniature.compose import compose
from miniature.evaluate_prompts import Evaluation, Pair, make_pairs, ranks
from miniature.icons import STYLES, load_objects
from miniature.judge import Judge
from miniature.scenes import Plans
from tests.miniature.test_judge import DRAWINGS, JUDGE, NAMES
from tests.tiny import make_cascade


def test_prompts() -> None:
    pair = Pair(("ant", "bus"), "orange", "blue", 7)
    assert pair.request(1, 1).prompt == "an ant next to a bus on an orange background"
    assert pair.request(0, 1).prompt == "(an ant:0) next to a bus on an orange background"
    assert pair.alone(1).prompt == "a bus on an orange background"
    assert pair.coloured(1.25).prompt == "an ant on an (orange:1.25) (blue:0.75) background"
    assert pair.coloured(1).prompt == "an ant on an orange blue background"


def test_pairs_are_the_same_each_time() -> None:
    names = [item.name for item in load_objects()]
    pairs = make_pairs(names, STYLES, 30)
    assert pairs == make_pairs(names, STYLES, 30)
    assert len({pair.seed for pair in pairs}) == 30
    assert all(pair.colour != pair.other_colour for pair in pairs)


def test_who_is_there_ranks_first() -> None:
    pair = Pair(("disc", "triangle"), "white", "black", 0)

    def drawn(first: int, second: int) -> torch.Tensor:
        plans = Plans.of(
            objects=np.array([[first, second]]),
            styles=np.zeros((1, 2), int),
            colours=np.zeros((1, 2), int),
            gradient_ways=np.zeros(1, int),
            relations=np.array([0 if second >= 0 else -1]),
            places=np.zeros(1, int),
            size_names=np.array([-1]),
            says_style=np.array([False]),
            says_background=np.array([False]),
        )
        return compose(DRAWINGS, plans, size=(128, 128))[0]

    disc, triangle = (NAMES.index(name) for name in pair.objects)
    assert ranks(JUDGE, drawn(disc, triangle), pair) == (0, 0)
    assert ranks(JUDGE, drawn(disc, -1), pair)[0] == 0
    assert ranks(JUDGE, drawn(triangle, -1), pair)[1] == 0


@pytest.mark.parametrize("removed", [True, False])
def test_the_tables(removed: bool, components: Mapping[str, object]) -> None:
    judge = Judge(DRAWINGS, NAMES, STYLES)
    pairs = [Pair(("disc", "bar"), "white", "blue", 3), Pair(("ring", "cross"), "red", "black", 4)]
    evaluation = Evaluation(make_cascade(components), judge, pairs, {"steps_prior": 1, "steps_decoder": 1})
    table = evaluation.removed() if removed else evaluation.recoloured()
    assert len({row.count("|") for row in table}) == 1
    assert all(len(made) == 2 for made in evaluation.pictures.values())
    shown = [row.split("|")[1].strip() for row in table[2:]]
    if removed:
        assert shown == [
            f"{which}, {what}"
            for which in ("first", "second")
            for what in ("weight 1", "weight 0, states", "weight 0, states and pooled", "without it")
        ]
    else:
        assert shown == ["states"] * 5 + ["states and pooled"] * 5
