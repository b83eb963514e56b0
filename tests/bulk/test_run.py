"""Runs begin, go on, and refuse to become another run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bulk import run as runs
from bulk.run import Run, RunError, usual_shard
from bulk.storage import Folder
from bulk.table import Table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    (tmp_path / "t.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(10)) + "bad\n")
    return Table(str(tmp_path / "t.jsonl"))


def wanted(table: Table) -> Run:
    survey = table.survey()
    return Run(table.sha256(), survey.rows, 4, 2, 0, survey.kept, "/here", {"name": "mini"})


@pytest.fixture(params=["file", "memory"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "out" / "deep") if request.param == "file" else f"memory://{tmp_path.name}/out")


def test_rows_of_shards(output: Folder, table: Table) -> None:
    run = runs.begin(output, wanted(table), table)
    assert (run.shards, [run.rows_in(shard) for shard in range(3)]) == (3, [4, 4, 3])
    rows = [row for shard in range(3) for row in runs.rows_of(output, run, shard)]
    assert [number for number, _ in rows] == list(range(11))
    assert [row for _, row in rows] == list(table.rows())
    assert runs.pending(output, run) == [0, 1, 2]
    output.write("00001_stats.json", b"{}")
    output.write("00002.tar", b"")  # not done
    assert runs.pending(Folder(output.url), runs.read(output)) == [0, 2]
    runs.finish(output)
    assert output.names() == {"run.json", "00001_stats.json", "00002.tar"}


def test_a_run_whose_rows_were_not_all_written_writes_them_again(output: Folder, table: Table) -> None:
    run = runs.begin(output, wanted(table), table)
    output.remove(f"{runs.ROWS}/{runs.COMPLETE}", f"{runs.ROWS}/00001.jsonl")
    runs.begin(output, run, table)
    assert len(runs.rows_of(output, run, 1)) == 4
    runs.finish(output)
    for shard in range(3):
        output.write(f"{runs.name(shard)}_stats.json", b"{}")
    runs.begin(output, run, table)
    assert runs.ROWS not in output.names(), "all is done"


def test_another_run_is_refused(output: Folder, table: Table) -> None:
    run = runs.begin(output, wanted(table), table)
    elsewhere = runs.begin(output, replace(run, folder="/there"), table)
    assert elsewhere.folder == "/here", "paths stay relative to where it began"
    for change in ({"table": "f" * 64}, {"batch": 3}, {"seed": 1}, {"shard": 8}, {"model": {"name": "other"}}):
        (field,) = change
        with pytest.raises(RunError, match=rf"^OUTPUT, .*, has a run whose {field} is .*; of this one it is "):
            runs.begin(output, replace(run, **change), table)
    assert json.loads(output.read("run.json"))["batch"] == 2


def test_strange_shards_are_not_overwritten(output: Folder, table: Table) -> None:
    output.write("00000_stats.json", b"{}")
    with pytest.raises(RunError, match=r"has shards but no run\.json; name another folder\.$"):
        runs.begin(output, wanted(table), table)


def test_files_appear_whole(tmp_path: Path) -> None:
    output = Folder(str(tmp_path))
    output.write("a", b"old")
    (tmp_path / "big").write_bytes(b"new")
    with pytest.raises(FileNotFoundError):
        output.publish({"a": tmp_path / "big", "b": tmp_path / "missing"})
    assert output.read("a") == b"old"
    assert "b" not in output.names()


@pytest.mark.parametrize(
    ("rows", "batch", "shard"), [(60, 4, 4), (60, 1, 1), (1, 4, 4), (1000, 4, 16), (100_000, 4, 1000), (10**6, 3, 999)]
)
def test_the_usual_shard(rows: int, batch: int, shard: int) -> None:
    assert usual_shard(rows, batch) == shard
