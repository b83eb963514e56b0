"""The command line of ``scripts/predict``: Cog's ``-i name=value``, ``-i name=@file`` and ``-o path``.

Names, kinds, ranges and defaults of the inputs are read from the signature of the predictor's ``run``. A request that
does not fit it is answered with one sentence and exit code 2; a prediction that fails, with one sentence and 1.
"""

import argparse
import inspect
import logging
import shutil
import sys
import typing
from pathlib import Path
from typing import Any

from cog import BaseRunner
from cog import Path as CogPath

from cascade.weights import WeightsError
from predict import Predictor

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}


class InputError(ValueError):
    """The command line asks for something that the predictor does not take."""


def read_inputs(runner: type[BaseRunner], assignments: list[str]) -> dict[str, Any]:
    """Turn ``name=value`` texts into the arguments of ``runner.run``, with its types, ranges and defaults.

    A list is given once an element, as to ``cog predict``.

    Raises:
        InputError: an unknown or missing name, or a value of the wrong kind or out of range.
    """
    fields = {name: p.default for name, p in inspect.signature(runner.run).parameters.items() if name != "self"}
    kinds = typing.get_type_hints(runner.run)
    inputs = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"-i {assignment} is not of the form name=value.")
        if name not in fields:
            raise InputError(f"There is no input {name!r}; there are {', '.join(fields)}.")
        kind = without_none(kinds[name])
        if typing.get_origin(kind) is list:
            (element,) = typing.get_args(kind)
            inputs.setdefault(name, []).append(read_value(name, text, element, fields[name]))
        else:
            inputs[name] = read_value(name, text, kind, fields[name])
    for name, field in fields.items():
        if name not in inputs:
            if field.default is None and type(None) not in typing.get_args(kinds[name]):
                raise InputError(f"The input {name!r} is missing: {field.description}")
            inputs[name] = field.default
    return inputs


def without_none(kind: Any) -> Any:
    """X of ``X | None``; any other type as it is."""
    kinds = typing.get_args(kind)
    return next(k for k in kinds if k is not type(None)) if type(None) in kinds else kind


def read_value(name: str, text: str, kind: Any, field: Any) -> Any:
    """One input's value from its text, checked against what the signature says of it."""
    if text.startswith("@"):
        file = Path(text[1:]).expanduser()
        if not file.is_file():
            raise InputError(f"{name}={text}: there is no file {file}.")
        if kind is CogPath:
            return CogPath(file)
        try:
            text = file.read_text(encoding="utf-8").removesuffix("\n")
        except UnicodeDecodeError:
            raise InputError(f"{name} is a text, and {file} holds none.") from None
    if kind is CogPath:
        raise InputError(f"{name} is a file: write {name}=@{text or 'file'}.")
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"{name} must be true or false, not {text!r}.")
        value = text == "true"
    else:
        try:
            value = kind(text)
        except ValueError:
            word = {int: "a whole number", float: "a number"}[kind]
            raise InputError(f"{name} must be {word}, not {text!r}.") from None
    if (field.ge is not None and not value >= field.ge) or (field.le is not None and not value <= field.le):
        raise InputError(f"{name} must be {describe_range(field)}, not {text}.")
    if field.choices is not None and value not in field.choices:
        raise InputError(f"{name} must be one of {', '.join(map(str, field.choices))}, not {text!r}.")
    return value


def describe_range(field: Any) -> str:
    if field.le is None:
        return f"{field.ge} or more"
    return f"{field.le} or less" if field.ge is None else f"from {field.ge} to {field.le}"


def list_inputs(runner: type[BaseRunner]) -> str:
    """A line an input: name, description, default, range or choices."""
    lines = []
    for name, parameter in inspect.signature(runner.run).parameters.items():
        if name == "self":
            continue
        field = parameter.default
        bounded = field.ge is not None or field.le is not None
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        notes = [] if default in (None, "") else [f"default {default}"]
        notes += [describe_range(field)] if bounded else []
        notes += [f"one of {', '.join(map(str, field.choices))}"] if field.choices else []
        lines.append(f"{name:24}{field.description}" + (f" ({', '.join(notes)})" if notes else ""))
    return "\n".join(lines)


def read_format(output: str) -> str | None:
    """The `output_format` that a file's ending asks for; None for a folder.

    Raises:
        InputError: it has another ending.
    """
    if names_folder(output):
        return None
    try:
        return FORMATS[Path(output).suffix.lower()]
    except KeyError:
        raise InputError(
            f"-o must end in {', '.join(FORMATS)}, or name a folder with a / at its end, unlike {output}."
        ) from None


def names_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def save(made: list[Path], output: str) -> list[Path]:
    """Copy the pictures to where they were asked for, with all that is written in them."""
    path = Path(output)
    if names_folder(output):
        targets = [path / source.name for source in made]
    elif len(made) == 1:
        targets = [path]
    else:
        targets = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(1, len(made) + 1)]
    for source, target in zip(made, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return targets


def main(arguments: list[str] | None = None) -> int:
    """Run the predictor once and save what it makes; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/predict", description="Make pictures from words.")
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input; NAME=@FILE takes it from a file; a list is given once an element; 'help' lists what there is",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        default="output.png",
        help="the picture, in the format of its ending (default: %(default)s); several pictures get -1, -2 ... before "
        "the ending, or lie in the folder that PATH names",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.input == ["help"]:
        sys.stdout.write(list_inputs(Predictor) + "\n")
        return 0
    try:
        wanted = read_format(options.output)
        inputs = read_inputs(Predictor, [f"output_format={wanted}", *options.input] if wanted else options.input)
        if wanted and inputs["output_format"] != wanted:
            raise InputError(f"output_format is {inputs['output_format']}, but -o is {options.output}.")
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    try:
        predictor = Predictor()
        predictor.setup()
        targets = save(predictor.run(**inputs), options.output)
    except (WeightsError, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for target in targets:
        sys.stdout.write(f"{target}\n")
    return 0
