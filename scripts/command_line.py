"""The command line of ``scripts/predict``: Cog's ``-i name=value``, ``-i name=@file`` and ``-o path``.

It turns texts into values; serving/inputs.py checks them, as over HTTP. A refused request prints one sentence and exits
with code 2; a failed prediction prints one sentence and exits with code 1.
"""

import argparse
import codecs
import inspect
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.limits import LIMITS, InputError, Limits, shown
from cascade.weights import WeightsError
from predict import Predictor
from serving.inputs import URL, check_inputs, file_named, similar_inputs
from serving.texts import from_text

FORMATS = {".png": "png", ".webp": "webp", ".jpg": "jpg", ".jpeg": "jpg"}
# UTF-32's marks first: the little-endian one begins with UTF-16's.
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_inputs(assignments: list[str]) -> dict[str, Any]:
    """All inputs, checked, from ``name=value`` texts. A list is given as one text per element, as to ``cog predict``.

    Raises:
        InputError: a name is unknown, a file cannot be read, or a value is not allowed.
    """
    given: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"-i {shown(assignment)} is not of the form name=value.")
        if name not in LIMITS:
            raise InputError(f"There is no input {shown(name)}; {similar_inputs(name) or '-i help lists all.'}")
        limits = LIMITS[name]
        value = read_value(name, text, limits)
        if limits.most is None:
            given[name] = value
        else:
            given.setdefault(name, []).append(value)
    try:
        return check_inputs(given)
    except InputError as error:
        raise InputError(f"{error}{advice_for(str(error), given)}") from None


def read_value(name: str, text: str, limits: Limits) -> Any:
    """One input's value, or one element of a list, from its text: see `from_text`. @FILE is a file's content, or a picture.

    Raises:
        InputError: a file cannot be read.
    """
    if text.startswith("@"):
        file = file_named(name, text)
        if limits.kind is Image.Image:
            return file
        text = read_text(name, file)
    return from_text(text, limits)


def read_text(name: str, file: Path) -> str:
    """A file's text, without a newline at its end. Its encoding is that of its byte order mark, else UTF-8.

    Raises:
        InputError: the file cannot be read, or is not a text.
    """
    try:
        content = file.read_bytes()
        encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
        text = content.decode(encoding)
    except OSError as error:
        raise InputError(f"{name}: {shown(str(file))} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # for example UTF-16 without a byte order mark
        raise InputError(f"{name}: {shown(str(file))} is not a text in UTF-8, or in UTF-16 with a byte order mark.")
    return re.sub("\r\n?", "\n", text).removesuffix("\n")


def advice_for(sentence: str, given: dict[str, Any]) -> str:
    """How to give a file, if a picture's value is a text but no URL; else empty."""
    name = re.match(r"\w*", sentence)[0]
    if name not in LIMITS or LIMITS[name].kind is not Image.Image:
        return ""
    values = given.get(name)
    texts = [text for text in (values if isinstance(values, list) else [values]) if isinstance(text, str)]
    local = next((text for text in texts if not URL.match(text) and text not in LIMITS[name].choices), None)
    return "" if local is None else f" A file is given as {name}=@{shown(local or 'file')[1:-1]}."


def list_inputs() -> str:
    """One line per input: name, description, default, range or choices."""
    lines = []
    for name, limits in LIMITS.items():
        description = inspect.signature(Predictor.run).parameters[name].default.description
        default = str(limits.default).lower() if isinstance(limits.default, bool) else limits.default
        notes = [] if default in (None, "") else [f"default {default}"]
        notes += [limits.range] if limits.range else []
        notes += [f"one of {', '.join(limits.choices)}"] if limits.choices and limits.kind is str else []
        lines.append(f"{name:24}{description}" + (f" ({', '.join(notes)})" if notes else ""))
    return "\n".join(lines)


def read_format(output: str) -> str | None:
    """The `output_format` for a file's ending; None for a folder.

    Raises:
        InputError: the file has another ending.
    """
    if names_folder(output):
        return None
    try:
        return FORMATS[Path(output).suffix.lower()]
    except KeyError:
        raise InputError(f"-o is {output}; it must end in {', '.join(FORMATS)}, or / for a folder.") from None


def names_folder(output: str) -> bool:
    return output.endswith("/") or os.path.isdir(output)


def save(made: list[Path], output: str) -> list[Path]:
    """Copy the picture files, with their metadata, to the output file or folder. Returns the new files."""
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
    """Make the pictures once and save them; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/predict", description="Make pictures from text and images.")
    parser.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input; NAME=@FILE reads it from a file; pictures may also be URLs; give a list as one -i per element; "
        "'-i help' lists all inputs",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        default="output.png",
        help="the picture's file, whose ending gives the format (default: %(default)s); several pictures get -1, -2 ... "
        "before the ending; PATH/ names a folder",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.input == ["help"]:
        sys.stdout.write(list_inputs() + "\n")
        return 0
    try:
        wanted = read_format(options.output)
        inputs = read_inputs([f"output_format={wanted}", *options.input] if wanted else options.input)
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
