"""Values of inputs from texts, as a command line and a csv file have them."""

from typing import Any

from cascade.limits import Limits


def from_text(text: str, limits: Limits) -> Any:
    """One input's value, or one element of a list, from its text: true, false and numbers where the input has such.

    A text that is no value of its kind stays a text, which `serving.inputs.check_inputs` refuses.
    """
    if limits.kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if limits.kind in (int, float):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
    return text
