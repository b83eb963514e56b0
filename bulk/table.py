"""Reads the table of prompts: parquet, JSON lines or csv, a row at a time, from any of fsspec's file systems.

A column is an input of predict.py, under its name and by its limits, which are those of `cascade.limits`. A column that is no
input is refused, because a misspelt one would do nothing; one that is to be kept is named by the caller.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow
from pyarrow import parquet

from cascade.limits import LIMITS, Limits, shown
from serving.inputs import similar_inputs
from serving.texts import from_text

# Rows of a parquet file that are in memory at a time.
AT_ONCE = 1000
# Characters of a csv file's cell; Python's own limit is 131,072.
LONGEST_CELL = 10_000_000


class TableError(ValueError):
    """A table cannot be used. The message is one sentence."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        values: by column. None: the cell is empty.
        error: why the row cannot be read; "": it can.
    """

    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Survey:
    """What a table has.

    Attributes:
        rows: their number.
        kept: of each kept column, the type of all its values: "int", "float", "bool" or "str"; "str" if they differ.
    """

    rows: int
    kept: dict[str, str]


class Table:
    """A table of prompts.

    Args:
        url: a path, or any URL of fsspec. The ending tells the format: .parquet, .jsonl, .ndjson, .json (a JSON object per
            line) or .csv (UTF-8, commas, a header). What ends in .gz beside that, .bz2 or .xz is unpacked.

    Raises:
        TableError: it has another ending.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        plain = url.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
        reader = next((reader for ending, reader in READERS.items() if plain.lower().endswith(ending)), None)
        if reader is None:
            raise TableError(f"PROMPTS is {shown(url)}; it must end in {', '.join(READERS)}.")
        self._reader = reader

    def rows(self) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            TableError: the file is not there, or cannot be read as its ending says.
            OSError: the file cannot be read.
        """
        try:
            with fsspec.open(self.url, "rb", compression="infer") as file:
                yield from self._reader(file)
        except FileNotFoundError:
            raise TableError(f"PROMPTS is {shown(self.url)}; there is no such file.") from None
        except (pyarrow.ArrowException, csv.Error, UnicodeDecodeError, EOFError) as error:
            raise TableError(f"PROMPTS, {shown(self.url)}, cannot be read: {' '.join(str(error).split())}.") from error

    def sha256(self) -> str:
        """The sha256 of the file, in hexadecimal."""
        found = hashlib.sha256()
        with fsspec.open(self.url, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    def survey(self, keep: Collection[str] = ()) -> Survey:
        """Read the table once, and see what is in it. Values of inputs are not checked.

        Args:
            keep: columns that are not inputs and go into the results unchanged.

        Raises:
            TableError: the table has no rows, or a column that is neither an input nor kept; or it lacks a kept one.
        """
        count, known = 0, {*LIMITS, *keep}
        kinds: dict[str, set[type]] = {name: set() for name in keep}
        for row in self.rows():
            count += 1
            if unknown := row.values.keys() - known:
                name = min(unknown)
                advice = similar_inputs(name) or "inputs are listed by scripts/predict -i help."
                raise TableError(
                    f"PROMPTS has a column {shown(name)}, which is not an input; {advice} "
                    f"--keep {name} copies it into the results."
                )
            for name in kinds.keys() & row.values.keys():
                kinds[name].add(type_of(row.values[name]))
        if not count:
            raise TableError(f"PROMPTS, {shown(self.url)}, has no rows.")
        for name, found in kinds.items():
            if not found:
                raise TableError(f"--keep is {shown(name)}; PROMPTS has no such column.")
        return Survey(count, {name: kind_of(found - {type(None)}) for name, found in kinds.items()})


def type_of(value: Any) -> type:
    """A value's type; of whole numbers that do not fit into 64 bits, text's."""
    return str if isinstance(value, int) and not -(2**63) <= value < 2**63 else type(value)


def kind_of(types: Collection[type]) -> str:
    """The type that values of these types can have together."""
    return next((kind.__name__ for kind in (int, float, bool) if types == {kind}), "str")


def parquet_rows(file: Any) -> Iterator[Row]:
    for batch in parquet.ParquetFile(file, pre_buffer=False).iter_batches(AT_ONCE):
        for values in batch.to_pylist():
            yield Row(values)


def json_rows(file: Any) -> Iterator[Row]:
    """Lines without any text are not rows."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield json_row(number, line)


def json_row(number: int, line: bytes) -> Row:
    try:
        values = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return Row(error=f"Line {number} is no JSON: {error}.")
    if not isinstance(values, dict):
        return Row(error=f"Line {number} is {shown(values)}; it must be a JSON object.")
    return Row(values)


def csv_rows(file: Any) -> Iterator[Row]:
    """Cells become values of their inputs' kinds; those of other columns are texts."""
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
    header = next(lines, [])
    for name in header:
        if header.count(name) > 1:
            raise TableError(f"PROMPTS has {header.count(name)} columns {shown(name)}.")
    for cells in lines:
        if len(cells) == len(header):
            yield Row({name: from_cell(text, LIMITS.get(name)) for name, text in zip(header, cells, strict=True)})
        elif cells:
            yield Row(error=f"Line {lines.line_num} has {len(cells)} cells; the header has {len(header)}.")


def from_cell(text: str, limits: Limits | None) -> Any:
    """The value of a cell. One that is empty is None, except in prompts, which may be empty. A list is in JSON, or is one
    element."""
    if limits is None:
        return text
    if limits.most is not None:
        if text.startswith("["):
            try:
                return json.loads(text)
            except (ValueError, RecursionError):
                return text
        return [from_text(text, limits)] if text else None
    free = limits.kind is str and not limits.choices
    return from_text(text, limits) if text or free else None


READERS: dict[str, Callable[[Any], Iterator[Row]]] = {
    ".parquet": parquet_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
}
