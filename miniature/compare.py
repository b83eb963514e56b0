"""Compares settings with the model's own: pictures of the same prompts and seeds with both, judged in pairs.

A pair shares its prompt and its seed, so most pairs agree. The mean of the differences then has a much smaller error than the
difference of two means.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cascade.images.tensors import to_image
from cascade.pipeline import Cascade
from miniature.compose import compose
from miniature.evaluate import score_pictures, text_to_pictures
from miniature.judge import Judge
from miniature.prompts import Prompt, plans_of
from miniature.scores import Estimate, Values, estimate, paired, pooled

EXACT = "exact"
PART = 4
"""Batches that are made and judged at a time: all pictures of thousands of prompts would take gigabytes."""


@dataclass
class Judged:
    """The pictures of one setting.

    Attributes:
        values: one per picture, by score, in the order of the prompts.
        seconds: time per picture, for each part.
    """

    values: Values = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def second(self) -> float:
        """Seconds of a typical picture. The first part may wait for kernels and graphs."""
        return statistics.median(self.seconds)


def compare(
    cascade: Cascade,
    judge: Judge,
    drawings: Tensor,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Mapping[str, Any]],
) -> dict[str, Judged]:
    """Make and judge pictures of all prompts with the model's own settings (`EXACT`) and with others.

    Args:
        cascade: the model.
        judge: of these drawings.
        drawings: see `icons.load_drawings`.
        prompts: of one object and of two.
        settings: attributes of `Request`, by name.
    """
    judged = {name: Judged() for name in (EXACT, *settings)}
    for part in _parts(prompts, PART * cascade.max_batch):
        plans = plans_of(part, judge.names, judge.styles)
        side = cascade.native_size
        scenes = [to_image(scene) for scene in compose(drawings, plans, len(judge.styles), (side, side))]
        for name, one in judged.items():
            start = time.perf_counter()
            pictures = text_to_pictures(cascade, part, **settings.get(name, {}))
            one.seconds.append((time.perf_counter() - start) / len(part))
            values, _ = score_pictures(judge, pictures, scenes, part)
            one.values = pooled([{"": one.values}, {"": values}]).get("", {})
    return judged


def _parts(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]


def differences(judged: Mapping[str, Judged]) -> dict[str, dict[str, Estimate]]:
    """{setting: {score: the mean difference to `EXACT` and its 95 % interval}}."""
    exact = judged[EXACT].values
    return {
        name: {score: paired(exact[score], values) for score, values in one.values.items()}
        for name, one in judged.items()
        if name != EXACT
    }


def comparison_table(judged: Mapping[str, Judged]) -> str:
    """A Markdown table: one row per score, one column per setting, with its difference to `EXACT` and the 95 % interval in
    points.
    """
    found = differences(judged)
    lines = ["| score | " + " | ".join(judged) + " |", "|---" + "|---:" * len(judged) + "|"]
    for score, values in judged[EXACT].values.items():
        cells = [f"{100 * estimate(values).mean:.1f} %"]
        for name, scores in found.items():
            one, mean = scores[score], estimate(judged[name].values[score]).mean
            cells.append(f"{100 * mean:.1f} %: {100 * one.mean:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    seconds = " | ".join(f"{one.second:.3g}" for one in judged.values())
    return "\n".join([*lines, f"| seconds a picture | {seconds} |"])
