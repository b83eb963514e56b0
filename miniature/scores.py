"""Scores of pictures: the mean of one value a picture, with its 95 % confidence interval, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Values = dict[str, list[float]]
"""One value a picture, by the score's name. A value that is right or wrong is 1 or 0."""

DEVIATIONS = 1.959964
"""Of the normal distribution: 95 % lie within so many standard deviations of the mean."""


@dataclass(frozen=True)
class Estimate:
    """A mean over pictures, and its 95 % confidence interval.

    Attributes:
        mean, low, high: in the unit of the values.
        count: number of pictures.
    """

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with a 95 % confidence interval for pictures of other prompts.

    A share of right answers (all values are 0 or 1) has Wilson's score interval: E. B. Wilson, "Probable inference, the law
    of succession, and statistical inference", Journal of the American Statistical Association 22 (1927). Any other mean has the
    normal interval, the mean +- 1.96 standard errors; a single value has none, so all three numbers are equal.
    """
    numbers = np.asarray(values, np.float64)
    count, mean = len(numbers), float(numbers.mean())
    if np.isin(numbers, (0, 1)).all():
        squared = DEVIATIONS**2
        centre = (mean + squared / (2 * count)) / (1 + squared / count)
        reach = DEVIATIONS / (1 + squared / count) * math.sqrt(mean * (1 - mean) / count + squared / (4 * count**2))
        # Rounding can put 0 or 1 a little outside of the interval.
        return Estimate(mean, min(mean, max(0.0, centre - reach)), max(mean, min(1.0, centre + reach)), count)
    return _normal(numbers)


def _normal(numbers: np.ndarray) -> Estimate:
    count, mean = len(numbers), float(numbers.mean())
    reach = DEVIATIONS * float(numbers.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Estimate(mean, mean - reach, mean + reach, count)


def paired(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean of ``after - before`` over at least one pair of pictures, with a 95 % confidence interval for other pairs.

    The difference of two shares of right answers has the interval of D. G. Bonett and R. M. Price, "Adjusted Wald confidence
    interval for a difference of binomial proportions based on paired data", Journal of Educational and Behavioral Statistics
    37 (2012): one pair is added to those that only the one got right, and one to those that only the other did. It has a
    width even if no pair differs. Any other mean difference has the normal interval.

    Raises:
        ValueError: there are not as many values after as before.
    """
    first, second = (np.asarray(values, np.float64) for values in (before, after))
    if first.shape != second.shape:
        raise ValueError(f"There are {len(first)} values before and {len(second)} after; pairs need equal numbers.")
    change, count = second - first, len(first)
    mean = float(change.mean())
    if not (np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all()):
        return _normal(change)
    won, lost = ((int((change == sign).sum()) + 1) / (count + 2) for sign in (1, -1))
    reach = DEVIATIONS * math.sqrt((won + lost - (won - lost) ** 2) / (count + 2))
    # The interval's centre is a little nearer to 0 than the mean.
    return Estimate(mean, max(-1.0, won - lost - reach), min(1.0, won - lost + reach), count)


def pooled(sets: Sequence[Mapping[str, Values]]) -> dict[str, Values]:
    """The values of several sets of pictures together: {column: {score: values}} of each to the same of all."""
    together: dict[str, Values] = {}
    for one in sets:
        for column, scores in one.items():
            for name, values in scores.items():
                together.setdefault(column, {}).setdefault(name, []).extend(values)
    return together


def table(columns: Mapping[str, Values]) -> str:
    """Scores as a Markdown table in percent: a row a score, a column a kind of picture.

    A cell is the mean and its 95 % interval: "93.4 % (92.2 to 94.4)". Scores without values are left empty.
    """
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    lines = ["| score | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name in names:
        cells = [_cell(scores.get(name, [])) for scores in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    one = estimate(values)
    return f"{100 * one.mean:.1f} % ({100 * one.low:.1f} to {100 * one.high:.1f})"
