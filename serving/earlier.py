"""Reads records of earlier versions, whose inputs have other names."""

from collections.abc import Mapping
from typing import Any


def current(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs under their present names. Values are not checked, and inputs with current names are kept.

    - ``image_prompt_strength``, one number for all image prompts, is now in ``image_prompt_strengths``.
    - ``control_starts`` and ``control_ends``, one number for all control images or one each, are now pairs in
      ``control_ranges``.
    """
    found = dict(inputs)
    strength = found.pop("image_prompt_strength", None)
    if strength is not None and not found.get("image_prompt_strengths"):
        found["image_prompt_strengths"] = [strength]
    starts, ends = (found.pop(name, None) for name in ("control_starts", "control_ends"))
    if (starts or ends) and not found.get("control_ranges"):
        found["control_ranges"] = _joined(starts or [0], ends or [1])
    return found


def _joined(starts: list[float], ends: list[float]) -> list[float]:
    """Pairs; a list of one number is used for all."""
    count = max(len(starts), len(ends))
    starts, ends = (one * count if len(one) == 1 else one for one in (starts, ends))
    return [value for pair in zip(starts, ends, strict=False) for value in pair]
