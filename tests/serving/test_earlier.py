"""Inputs that records of earlier versions name otherwise."""

from typing import Any

import pytest

from serving.earlier import current


@pytest.mark.parametrize(
    ("recorded", "now"),
    [
        ({"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1}),
        ({"image_prompt_strength": 0.5}, {"image_prompt_strengths": [0.5]}),
        ({"image_prompt_strength": 1.0, "image_prompt_strengths": [1, 2]}, {"image_prompt_strengths": [1, 2]}),
        ({"control_starts": [0.25]}, {"control_ranges": [0.25, 1]}),
        ({"control_ends": [0.5, 0.75]}, {"control_ranges": [0, 0.5, 0, 0.75]}),
        ({"control_starts": [0.1], "control_ends": [0.5, 0.75]}, {"control_ranges": [0.1, 0.5, 0.1, 0.75]}),
        ({"control_starts": [0.1, 0.2], "control_ends": [0.5, 0.75]}, {"control_ranges": [0.1, 0.5, 0.2, 0.75]}),
    ],
)
def test_names_are_those_of_now(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    kept = dict(recorded)
    assert current(recorded) == now
    assert recorded == kept
