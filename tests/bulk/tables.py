"""Runs for tests, and what they leave."""

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from bulk import run as runs
from bulk.maker import Maker
from bulk.run import Run
from bulk.storage import Folder
from bulk.table import Table

# What the tiny networks of conftest.py make in a moment.
SMALL = {"width": 64, "height": 64, "steps_prior": 1, "steps_decoder": 1, "output_format": "png"}


def write_table(file: Path, rows: list[dict[str, Any] | str]) -> Path:
    """JSON lines. A row that is a text becomes that line."""
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


def make_run(folder: Path, rows: list[dict[str, Any] | str], keep: tuple[str, ...] = (), **settings: Any) -> Maker:
    """Make all shards of a run in this process. Returns the `Maker`, with its run and output.

    settings: fields of `Run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(str(write_table(folder / "table.jsonl", rows)))
    survey = table.survey(keep)
    usual = {"shard": 4, "batch": 2, "seed": 0, "folder": str(folder), "model": {}}
    run = Run(table=table.sha256(), rows=survey.rows, keep=survey.kept, **{**usual, **settings})
    output = Folder(str(folder / "out"))
    runs.begin(output, run, table)
    maker = Maker(output.url)
    for shard in runs.pending(output, run):
        maker.make(shard)
    return maker


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's parquet files, in order."""
    files = sorted(folder.glob("*.parquet"))
    return pyarrow.concat_tables([parquet.read_table(file) for file in files]).to_pylist()


def members_of(folder: Path) -> dict[str, bytes]:
    """The files in a run's tar files, by name."""
    found = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


def pictures_of(folder: Path) -> dict[str, str]:
    """The sha256 of the pictures in a run's tar files, by key; each as its line and its JSON file say."""
    members, lines = members_of(folder), lines_of(folder)
    made = {line["key"]: line["sha256"] for line in lines if line["status"] == "success"}
    assert len(made) + sum(line["status"] == "failed" for line in lines) == len(lines)
    found = {name: content for name, content in members.items() if not name.endswith((".txt", ".json"))}
    assert {name.partition(".")[0]: hashlib.sha256(content).hexdigest() for name, content in found.items()} == made
    for key, sha256 in made.items():
        assert json.loads(members[f"{key}.json"])["sha256"] == sha256
    assert len(members) == 3 * len(made)
    return made


def open_picture(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")
