"""Tables of prompts: three formats, one meaning."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bulk.run import Run
from bulk.table import Table, TableError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a cat, "big"\nand grey', "width": 128, "guidance_scale_prior": 2.5, "upscale": False, "seed": 7},
    {"prompt": "", "width": None, "guidance_scale_prior": None, "upscale": True, "seed": None},
    {"prompt": "ein Häuschen", "width": 64, "guidance_scale_prior": 4.0, "upscale": None, "seed": 2**40},
]
LISTS: list[list[Any] | None] = [["a.png", "b.png"], None, ["https://host/c.png"]]


def cell(value: Any) -> Any:
    """A value as a csv file has it."""
    return "" if value is None else json.dumps(value) if isinstance(value, list | bool) else value


def write(folder: Path, ending: str, rows: list[dict[str, Any]]) -> Path:
    """A table, as others' programs write it."""
    file = folder / f"table{ending}"
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif ending.startswith(".csv"):
        with file.open("w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, rows[0].keys())
            writer.writeheader()
            for row in rows:
                writer.writerow({name: cell(value) for name, value in row.items()})
    else:
        text = "".join(f"{json.dumps(row)}\n\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)
    return file


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".ndjson", ".json", ".jsonl.gz", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = [{**row, "image_prompts": images} for row, images in zip(ROWS, LISTS, strict=True)]
    table = Table(str(write(tmp_path, ending, rows)))
    assert [(row.values, row.error) for row in table.rows()] == [(row, "") for row in rows]
    assert table.survey().rows == 3


def test_a_cell_that_is_no_json_is_one_element(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,control_scales,image_prompts,mask\nx,0.5,[a.png,alpha\n")
    (row,) = Table(str(tmp_path / "t.csv")).rows()
    assert row.values == {"prompt": "x", "control_scales": [0.5], "image_prompts": "[a.png", "mask": "alpha"}


def test_bad_lines_are_rows_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\nno\n\n[1]\n{"prompt": "\xff"}\n{"prompt": "b"}')
    found = [(row.values, row.error.partition(" is ")[0]) for row in Table(str(tmp_path / "t.jsonl")).rows()]
    assert found == [({"prompt": "a"}, ""), ({}, "Line 2"), ({}, "Line 4"), ({}, "Line 5"), ({"prompt": "b"}, "")]
    (tmp_path / "t.csv").write_text('prompt,seed\na\n"b\nc",2\nd,3,4\n')
    found = [(row.values, row.error) for row in Table(str(tmp_path / "t.csv")).rows()]
    assert found == [
        ({}, "Line 2 has 1 cells; the header has 2."),
        ({"prompt": "b\nc", "seed": 2}, ""),
        ({}, "Line 5 has 3 cells; the header has 2."),
    ]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv"])
def test_a_column_that_is_no_input_is_refused_unless_it_is_kept(tmp_path: Path, ending: str) -> None:
    table = Table(str(write(tmp_path, ending, [{"prompt": "a", "promt": "b"}])))
    with pytest.raises(
        TableError, match=r"^PROMPTS has a column 'promt', which is not an input; did you mean prompt\? --keep"
    ):
        table.survey()
    assert table.survey(["promt"]).kept == {"promt": "str"}
    with pytest.raises(TableError, match=r"^--keep is 'id'; PROMPTS has no such column\.$"):
        table.survey(["promt", "id"])


def test_kept_columns_have_one_type(tmp_path: Path) -> None:
    values = {"a": [1, None], "b": [1, 1.5], "c": [True, False], "d": [0.5, 2.5], "e": [2**70, 1], "f": [[1], "x"]}
    rows = [{name: pair[place] for name, pair in values.items()} for place in range(2)]
    found = Table(str(write(tmp_path, ".jsonl", rows))).survey(values).kept
    assert found == {"a": "int", "b": "str", "c": "bool", "d": "float", "e": "str", "f": "str"}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.txt", b"a", r"^PROMPTS is '.*t\.txt'; it must end in \.parquet, \.jsonl, \.ndjson, \.json, \.csv\.$"),
        ("t.csv", b"prompt\n", r"^PROMPTS, '.*t\.csv', has no rows\.$"),
        ("t.jsonl", b"\n\n", r"has no rows\.$"),
        ("t.csv", b"prompt,prompt\na,b\n", r"^PROMPTS has 2 columns 'prompt'\.$"),
        ("t.csv", "prompt\na\n".encode("utf-16"), r"^PROMPTS, '.*', cannot be read: 'utf-8' codec"),
        ("t.parquet", b"PAR1 no", r"^PROMPTS, '.*', cannot be read: "),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=sentence):
        Table(str(tmp_path / name)).survey()


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"^PROMPTS is '.*no\.csv'; there is no such file\.$"):
        Table(str(tmp_path / "no.csv")).survey()


def run_of(**others: Any) -> Run:
    usual = {"table": "0", "rows": 10, "shard": 4, "batch": 2, "seed": 0, "keep": {}, "folder": "/", "model": {}}
    return Run(**{**usual, **others})


def test_seeds_and_keys_depend_on_the_row_alone() -> None:
    run = run_of()
    assert [run.key(number) for number in (0, 3, 4, 9)] == ["000000", "000003", "000010", "000021"]
    assert run_of(shard=10_000, rows=20_000).key(10_001) == "000010001", "as img2dataset has it"
    seeds = [run.seed_of(number) for number in range(1000)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seeds == [run_of(rows=99, shard=7, batch=5).seed_of(number) for number in range(1000)]
    assert not set(seeds) & {run_of(seed=1).seed_of(number) for number in range(1000)}
