"""The command line of ``scripts/generate-many``: a table of prompts becomes shards of pictures, by `bulk`.

Exits with 0 when every row has a picture or an error, with 2 if the table or an option is refused, with 1 if the run stops.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bulk import run as runs
from bulk.run import Run, RunError, usual_shard
from bulk.shard import TAKEN
from bulk.storage import Folder
from bulk.table import Table, TableError
from cascade.limits import LIMITS
from cascade.weights import ModelFolder, WeightsError
from serving.early import find_weights
from serving.progress import ProgressLines
from serving.record import weights_digest

BATCH = 4
# Seconds between lines of progress where there is no terminal.
LINES = 10.0
BAR = "{percentage:3.0f}%|{bar:20}| {n_fmt} of {total_fmt} rows, {elapsed} so far, {remaining} left{postfix}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options. Ends the process with code 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="scripts/generate-many",
        description="Make pictures of a table of prompts, with several workers. The same command goes on after a stop.",
    )
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="the table: .parquet, .jsonl or .csv; a column for each input that is given, see scripts/predict -i help",
    )
    parser.add_argument("output", metavar="OUTPUT", help="a folder, or a URL of one that fsspec can write to")
    parser.add_argument(
        "--workers", type=number, help="how many work at a time (default: one a GPU, or one if there is no GPU)"
    )
    parser.add_argument(
        "--batch", type=number, default=BATCH, help="most pictures that are made together (default: %(default)s)"
    )
    parser.add_argument(
        "--shard", type=number, help="rows of each shard (default: 1000, or fewer so that there are about 64 shards)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the seeds of rows that have none (default: %(default)s)"
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="COLUMN",
        help="copy a column that is not an input into the results",
    )
    parser.add_argument("--address", help="join the Ray cluster there, such as auto, instead of starting Ray here")
    options = parser.parse_args(arguments)
    for name in options.keep:
        if name in LIMITS or name in TAKEN:
            parser.error(f"--keep is {name}, which is a column of the results already")
    return options


def number(text: str) -> int:
    """A whole number of at least 1."""
    if (found := int(text)) < 1:
        raise ValueError
    return found


def plan(options: argparse.Namespace, table: Table) -> Run:
    """The run that the options ask for. Reads the table once.

    Raises:
        TableError, WeightsError, OSError: the table, or the model's folder, cannot be used.
    """
    model = ModelFolder.open(find_weights())
    survey = table.survey(dict.fromkeys(options.keep))
    return Run(
        table=table.sha256(),
        rows=survey.rows,
        shard=options.shard or usual_shard(survey.rows, options.batch),
        batch=options.batch,
        seed=options.seed,
        keep=survey.kept,
        folder=str(Path.cwd()),
        model={"name": model.name, "sha256": weights_digest(model) or ""},
    )


def make(options: argparse.Namespace, output: Folder, run: Run, left: list[int]) -> None:
    """Make shards on Ray, and show progress.

    Raises:
        RunError: the run stopped.
    """
    from bulk import cluster  # takes seconds, and is not needed when all is done

    before = run.rows - sum(run.rows_in(shard) for shard in left)
    start, terminal = time.perf_counter(), sys.stderr.isatty()
    bar_class = tqdm if terminal else ProgressLines
    with bar_class(total=run.rows, initial=before, bar_format=BAR, mininterval=0.1 if terminal else LINES) as bar:

        def show(done: cluster.Done) -> None:
            rate = done.pictures / (time.perf_counter() - start)
            bar.set_postfix_str(
                f"{rate:.2f} pictures/s" + f", {done.failed:,} failed" * bool(done.failed), refresh=False
            )
            bar.update(before + done.rows - bar.n)

        done = cluster.make(output.url, left, address=options.address, workers=options.workers, on_progress=show)
        show(done)
    seconds = time.perf_counter() - start
    sys.stderr.write(f"{done.pictures:,} pictures in {seconds:.0f} s, {done.failed:,} failed: column error says why.\n")


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing; ``arguments`` default to the process's. Returns the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        table = Table(options.prompts)
        output = Folder(options.output)
        run = runs.begin(output, plan(options, table), table)
    except (TableError, RunError, WeightsError, OSError, ValueError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    left = runs.pending(output, run)
    rows = sum(run.rows_in(shard) for shard in left)
    said = f"{run.rows:,} rows in {run.shards:,} shards of {run.shard:,}; {run.rows - rows:,} rows are done."
    sys.stderr.write(f"{said}\n")
    if left:
        try:
            make(options, output, run, left)
        except KeyboardInterrupt:
            sys.stderr.write("Stopped. The same command goes on.\n")
            return 1
        except RunError as error:
            sys.stderr.write(f"{error}\n")
            return 1
    runs.finish(output)
    sys.stdout.write(f"{output.url}\n")
    return 0
