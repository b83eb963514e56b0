"""Values of inputs from texts, as a command line and a csv file have them."""

from typing import Any

from cascade.limits import Limits


def from_text(text: str, limits: Limits) -> Any:
    """The value of an input, or one element of a list, as a bool or number where the input's kind is one.

    Text that is not a value of that kind is returned unchanged; `serving.inputs.check_inputs` refuses it.
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
