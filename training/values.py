"""Reads TOML files, and checks their values by type annotations; words the error for a wrong one."""

import inspect
import math
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from training.errors import TrainingError

Kinds = Mapping[str, tuple[Any, bool]]
"""For each name that a table may hold: its annotation, and whether it is required."""


def is_finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN. A whole number may be too large for a float; then it is not finite."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Range:
    """The range of a finite number, including both ends."""

    least: float
    most: float = math.inf

    def check(self, where: str, value: float) -> None:
        """Raises `TrainingError` if the value is out of range, infinite or NaN; ``where`` is its name in the error."""
        if not is_finite(value):
            raise TrainingError(f"{where} is {value}; it must be a finite number.")
        if not self.least <= value <= self.most:
            if math.isfinite(self.most):
                raise TrainingError(f"{where} is {value}; it must be from {self.least} to {self.most}.")
            allowed = f"be at least {self.least}" if self.least else "not be negative"
            raise TrainingError(f"{where} is {value}; it must {allowed}.")


Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]


def kinds_of(function: Callable[..., Any]) -> Kinds:
    """The arguments of a function or class."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: (parameter.annotation, parameter.default is parameter.empty)
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def check_values(where: str, given: Mapping[str, Any], kinds: Kinds) -> None:
    """Checks the names, types and ranges of a table's values.

    Args:
        where: the table's name in an error.
        given: the table.
        kinds: the values that it may hold.

    Raises:
        TrainingError: a value is unknown, missing or wrong.
    """
    for name, value in given.items():
        if name not in kinds:
            raise TrainingError(f"{where} has an unknown name {name}; {_known(kinds)}.")
        kind, _ = kinds[name]
        if not fits(value, kind):
            raise TrainingError(f"{where} {name} is {value!r}; it must be {describe(kind)}.")
        if get_origin(kind) is Annotated:
            get_args(kind)[1].check(f"{where} {name}", value)
    for name, (_, needed) in kinds.items():
        if needed and name not in given:
            raise TrainingError(f"{where} lacks {name}.")


def _known(names: Collection[str]) -> str:
    return f"it may hold {', '.join(names)}" if names else "it may hold none"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a TOML file fits the annotation ``kind``. Annotations that are not known here fit all values."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind is float:
        return type(value) in (int, float) and is_finite(value)
    if kind in (int, bool, str, dict):
        return type(value) is kind
    if kind is types.NoneType:
        return value is None
    if isinstance(kind, type):
        return isinstance(value, kind)
    if isinstance(origin, type):  # Mapping[str, Any]
        return isinstance(value, origin)
    return True


def describe(kind: Any) -> str:
    """An annotation in words, for the error."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "a table"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments if one is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        plural = arguments[-1] is Ellipsis
        inner = describe(arguments[0])
        return f"a list, each {inner}" if plural else f"a list of {len(arguments)} values, each {inner}"
    return words.get(kind, "a table" if isinstance(origin, type) else getattr(kind, "__name__", str(kind)))


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """The tables of a TOML file, which an error calls ``name`` if it is missing.

    Raises:
        TrainingError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TrainingError(f"There is no {name} {path}.") from None
    except (OSError, ValueError) as error:  # ValueError also for a number of more than 4,300 digits
        raise TrainingError(f"{path} is not a TOML file: {error}.") from error
