"""A run: a table, cut into shards of fixed rows, and what is done of it. All of it is in the output's folder.

    run.json                what the run is: `Run`'s fields; the same command goes on with it, and another one is refused
    _rows/00000.jsonl       the rows of each shard, until all are made; _rows/complete, when all are there
    00000.tar, 00000.parquet, 00000_stats.json   a shard that is done, see `bulk.shard`

Shards, keys, seeds and batches depend on the table and the settings in run.json alone, never on what is done or on how many
workers there are. So a shard that is made again has the same pictures under the same keys.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bulk.storage import PARTS, Folder
from bulk.table import Row, Table

FILE = "run.json"
ROWS = "_rows"
COMPLETE = "complete"
STATS = re.compile(r"(\d{5,})_stats\.json")
# Rows of a shard, if the table is long; of a short one, as many as make this number of shards.
SHARD = 1000
SHARDS = 64
SEEDS = 2**32


class RunError(ValueError):
    """A run cannot begin or go on. The message is one sentence."""


@dataclass(frozen=True)
class Run:
    """What a run is.

    Attributes:
        table: sha256 of its file.
        rows: number of its rows.
        shard: rows of each shard; the last may have fewer.
        batch: most pictures that are made together.
        seed: of the seeds of rows that have none.
        keep: types of the columns that are not inputs, see `Survey`.
        folder: of which paths of pictures in the table are relative.
        model: name and sha256 of the model, as in metadata.
    """

    table: str
    rows: int
    shard: int
    batch: int
    seed: int
    keep: Mapping[str, str]
    folder: str
    model: Mapping[str, str]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard)

    def rows_in(self, shard: int) -> int:
        """The number of a shard's rows."""
        return min(self.shard, self.rows - shard * self.shard)

    def key(self, number: int) -> str:
        """Of a row: the shard's name and the row's place in it, as img2dataset numbers pictures."""
        shard, place = divmod(number, self.shard)
        return f"{name(shard)}{place:0{len(str(self.shard - 1))}}"

    def seed_of(self, number: int) -> int:
        """Of a row without a seed: 0 to 2**32 - 1, the same in every run of this seed."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{number}".encode()).digest()[:4]) % SEEDS


def name(shard: int) -> str:
    """A shard's name, as in 00012.tar."""
    return f"{shard:05}"


def usual_shard(rows: int, batch: int) -> int:
    """The default rows per shard: enough for about `SHARDS` shards, at most `SHARD`; a multiple of `batch` if possible."""
    wanted = min(SHARD, -(-rows // SHARDS))
    return max(wanted // batch, 1) * batch


def begin(output: Folder, wanted: Run, table: Table) -> Run:
    """The run of a folder: one that goes on, or `wanted`, whose rows are written.

    Raises:
        RunError: the folder has another run.
    """
    run = reread(output, wanted)
    if run is None:
        if done(output):
            raise RunError(f"OUTPUT, {output.url}, has shards but no {FILE}; name another folder.")
        output.write(FILE, json.dumps(asdict(wanted), indent=1).encode())
        run = wanted
    if pending(output, run) and COMPLETE not in output.names(ROWS):
        write_rows(output, run, table)
    return run


def reread(output: Folder, wanted: Run) -> Run | None:
    """The run of a folder; None: it has none.

    Raises:
        RunError: it has another one than is wanted.
    """
    try:
        run = read(output)
    except FileNotFoundError:
        return None
    for field in asdict(run):
        is_, asked = getattr(run, field), getattr(wanted, field)
        # Paths stay relative to where the run began.
        if field != "folder" and is_ != asked:
            raise RunError(
                f"OUTPUT, {output.url}, has a run whose {field} is {is_}; of this one it is {asked}. "
                "Name another folder, or go on with the same table, options and model."
            )
    return run


def read(output: Folder) -> Run:
    """The run of a folder.

    Raises:
        FileNotFoundError: it has none.
    """
    return Run(**json.loads(output.read(FILE)))


def write_rows(output: Folder, run: Run, table: Table) -> None:
    """Write the rows of each shard."""
    rows = table.rows()
    for shard in range(run.shards):
        lines = [json.dumps({"values": row.values, "error": row.error}, default=str) for row in first(rows, run.shard)]
        output.write(f"{ROWS}/{name(shard)}.jsonl", "\n".join(lines).encode())
    output.write(f"{ROWS}/{COMPLETE}", b"")


def first(rows: Iterator[Row], number: int) -> Iterator[Row]:
    return itertools.islice(rows, number)


def rows_of(output: Folder, run: Run, shard: int) -> list[tuple[int, Row]]:
    """The rows of a shard, with their numbers in the table."""
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in output.read(f"{ROWS}/{name(shard)}.jsonl").decode().split("\n")
    ]
    return [(shard * run.shard + place, Row(**line)) for place, line in enumerate(lines)]


def done(output: Folder) -> set[int]:
    """The shards that are done: those with a file of statistics, which is written last."""
    return {int(found[1]) for one in output.names() if (found := STATS.fullmatch(one))}


def pending(output: Folder, run: Run) -> list[int]:
    """The shards that are not done, in order."""
    there = done(output)
    return [shard for shard in range(run.shards) if shard not in there]


def finish(output: Folder) -> None:
    """Remove what only a run that is not done needs."""
    output.remove(ROWS, PARTS)
