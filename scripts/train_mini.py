"""Trains the miniature from nothing: drawings, every stage, the model folder, and what it all cost.

With another configuration, it trains all stages on a folder of one's own pictures, or on what another source reads.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from miniature.icons import load_drawings
from miniature.vocabulary import vocabulary
from scripts.environment import ROOT
from serving.vocabulary import FILE
from training import command
from training.assemble import assemble
from training.configuration import read_configuration
from training.errors import TrainingError, writing
from training.recipe import AT_MOST_AHEAD, costs, costs_table, train_all, visible_gpus
from training.run import FINISHED
from training.sources import check_path
from training.stages import ORDER

COSTS = "training.json"
DRAWINGS = "miniature.dataset:Drawings"
"""The source that reads the miniature's drawings, as a configuration names it."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/train-mini", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "miniature" / "mini.toml", help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "build" / "mini" / "drawings.zip",
        help="the drawings, a zip that is made if it is not there, or a folder of pictures with captions (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mini", help="default: %(default)s")
    command.add_minutes(parser)
    parser.add_argument(
        "--at-once",
        action=command.AtLeastOne,
        help="stages that may run at the same time (default: as many as there are GPUs, at least 1)",
    )
    parser.add_argument(
        "--compile-ahead",
        action=command.AtLeastOne,
        nargs="?",
        const=AT_MOST_AHEAD,
        default=0,
        metavar="N",
        help="compile stages that cannot start yet beside those that run, so many at the same time (default: %(const)s); on "
        "GPUs only",
    )
    parser.add_argument(
        "--copy-to", type=Path, help="a folder that gets what each finished stage made, to go on elsewhere with"
    )
    options = parser.parse_args(arguments)
    if options.at_once is None:
        options.at_once = max(1, len(visible_gpus()))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    deadline = time.time() + 60 * options.minutes
    try:
        return train_mini(options, deadline)
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def train_mini(options: argparse.Namespace, deadline: float) -> int:
    """Trains what is not finished, up to the deadline; returns the exit code of what failed, or 0.

    Args:
        options: as `parse` returns them.
        deadline: wall-clock time (`time.time`).

    Raises:
        TrainingError: the configuration, the data or a file is wrong.
    """
    config, data, output = (path.absolute() for path in (options.config, options.data, options.output))
    copy_to = options.copy_to.absolute() if options.copy_to else None
    tables = read_configuration(config)
    drawn = tables["data"].get("source") == DRAWINGS and not data.is_dir()
    if drawn and data.suffix == ".zip" and not data.exists():
        code = subprocess.run([ROOT / "scripts" / "build-mini-data", "--output", data], cwd=ROOT).returncode
        if code:
            return code
    check_path(data)
    code = train_all(
        config,
        data,
        output,
        at_once=options.at_once,
        deadline=deadline,
        copy_to=copy_to,
        compile_ahead=options.compile_ahead,
    )
    if code:
        return code
    left = [stage for stage in ORDER if stage in tables and not (output / stage / FINISHED).exists()]
    if left:
        sys.stdout.write(f"The time is up; left: {', '.join(left)}. Call again to go on.\n")
        return 0
    folder = output / "weights"
    assemble(tables, output / "model", folder)
    made = costs(output)
    with writing(folder):
        if drawn:
            _, names, styles = load_drawings(data)
            (folder / FILE).write_text(json.dumps(vocabulary(names, styles), indent=1) + "\n", encoding="utf-8")
        (folder / COSTS).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"{costs_table(made)}\n{folder}\n")
    return 0
