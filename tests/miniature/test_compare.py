"""Settings compared on pairs of pictures, and the interval of a paired difference."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from cascade.pipeline import Cascade
from miniature.compare import EXACT, compare, comparison_table, differences
from miniature.icons import STYLES, load_objects
from miniature.judge import Judge
from miniature.prompts import make_prompts
from miniature.scores import estimate, paired
from tests.tiny import make_cascade

NAMES = [item.name for item in load_objects()][:8]


def pairs(both: int, before: int, after: int, neither: int) -> tuple[list[float], list[float]]:
    """Pairs of right (1) and wrong (0): right in both, only before, only after, in neither."""
    first = [1.0] * both + [1.0] * before + [0.0] * after + [0.0] * neither
    second = [1.0] * both + [0.0] * before + [1.0] * after + [0.0] * neither
    return first, second


def test_the_interval_is_bonett_and_prices() -> None:
    """Worked by hand: (15 + 1) / 102 and (5 + 1) / 102 for 100 pairs of which 15 were lost and 5 won."""
    one = paired(*pairs(70, 15, 5, 10))
    lost, won = 16 / 102, 6 / 102
    reach = 1.959964 * ((lost + won - (won - lost) ** 2) / 102) ** 0.5
    assert (one.mean, one.count) == (pytest.approx(-0.10), 100)
    assert (one.low, one.high) == (pytest.approx(won - lost - reach), pytest.approx(won - lost + reach))


def test_what_never_differs_has_an_interval_too() -> None:
    one = paired(*pairs(90, 0, 0, 10))
    assert one.mean == 0
    assert -0.05 < one.low < 0 < one.high < 0.05


def test_pairs_say_more_than_two_means() -> None:
    before, after = pairs(850, 20, 20, 110)
    one, separate = paired(before, after), estimate(before)
    independent = 2**0.5 * (separate.high - separate.low)  # of the difference of two such means
    assert one.high - one.low < 0.5 * independent


def test_other_differences_have_the_normal_interval() -> None:
    before, after = [0.5, 0.9, 1.2, 0.7], [0.6, 0.8, 1.5, 0.9]
    change = np.subtract(after, before)
    one = paired(before, after)
    reach = 1.959964 * change.std(ddof=1) / 2
    assert (one.low, one.high) == (pytest.approx(change.mean() - reach), pytest.approx(change.mean() + reach))


@pytest.mark.parametrize(("lost", "won"), [(0.03, 0.03), (0.08, 0.05), (0.002, 0.001)])
def test_the_interval_holds_the_truth_95_times_of_100(lost: float, won: float) -> None:
    draws = np.random.default_rng(0)
    inside, tries, count = 0, 2000, 1500
    for _ in range(tries):
        losses, wins, _ = draws.multinomial(count, [lost, won, 1 - lost - won])
        one = paired(*pairs(count - losses - wins, int(losses), int(wins), 0))
        inside += one.low <= won - lost <= one.high
    assert 0.935 < inside / tries <= 1


def test_pairs_need_as_many() -> None:
    with pytest.raises(ValueError, match="There are 2 values before and 1 after"):
        paired([1, 0], [1])


@pytest.fixture(scope="module")
def tiny(components: Mapping[str, object]) -> Cascade:
    return make_cascade(components, native_size=64, max_batch=2)


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    coarse = torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    coarse = torch.cat([coarse, torch.ones(24, 1, 6, 6)], 1)
    return (coarse.repeat_interleave(8, 2).repeat_interleave(8, 3) * 255).byte()


@pytest.mark.slow
def test_settings_are_compared_on_the_same_prompts_and_seeds(tiny: Cascade, drawings: torch.Tensor) -> None:
    prompts = make_prompts(NAMES, STYLES, 5, count=12, two=6)
    assert [len(prompt.objects) for prompt in prompts] == [1] * 6 + [2] * 6
    settings = {"the same": {"steps_prior": 3}, "fewer": {"steps_prior": 1, "steps_decoder": 1}}
    judged = compare(tiny, Judge(drawings, NAMES, STYLES), drawings, prompts, settings)
    assert list(judged) == [EXACT, *settings]
    found = differences(judged)
    assert judged["the same"].values == judged[EXACT].values  # 3 is the model's own
    assert judged["fewer"].values["sharpness"] != judged[EXACT].values["sharpness"]
    assert {
        score: one.count for score, one in found["fewer"].items() if score in ("object first", "both objects first")
    } == {
        "object first": 6,
        "both objects first": 6,
    }
    assert all(one.mean == 0 for one in found["the same"].values())
    table = comparison_table(judged).splitlines()
    assert table[0] == "| score | exact | the same | fewer |"
    first = next(line for line in table if line.startswith("| object first |"))
    assert "%: +0.0 (" in first
    assert table[-1].startswith("| seconds a picture | ")
