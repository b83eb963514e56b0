"""Trains the miniature from nothing: drawings, every stage in a process of its own, and the model folder."""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

from scripts.environment import ROOT
from training.assemble import assemble
from training.configuration import read_configuration
from training.errors import TrainingError
from training.run import FINISHED, ORDER


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/train-mini", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "miniature" / "mini.toml", help="default: %(default)s")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "build" / "mini" / "drawings.zip",
        help="the drawings, made if they are not there (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "mini", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; call again to go on")
    options = parser.parse_args(arguments)
    end = time.time() + 60 * options.minutes
    try:
        files = (path.absolute() for path in (options.config, options.data, options.output))
        return train_all(*files, end)
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def train_all(config: Path, data: Path, output: Path, end: float) -> int:
    """Trains what is not finished, up to the time `end`; returns the exit code of what failed, or 0."""
    checked = read_configuration(config)
    if not data.exists():
        code = run([ROOT / "scripts" / "build-mini-data", "--output", data])
        if code:
            return code
    for stage in ORDER:
        if (output / stage / FINISHED).exists():
            continue
        command = [sys.executable, "-m", "training.run", config, stage, "--data", data, "--output", output]
        if math.isfinite(end):
            command += ["--minutes", str(max(0.0, (end - time.time()) / 60))]
        code = run(command)
        if code:
            return code
        if not (output / stage / FINISHED).exists():
            sys.stdout.write(f"The time is up in {stage}; call again to go on.\n")
            return 0
    folder = output / "weights"
    assemble(checked, output / "model", folder)
    sys.stdout.write(f"{folder}\n")
    return 0


def run(command: list[str | Path]) -> int:
    """Runs a command, which says itself what is wrong; returns its exit code. Ctrl-C is the command's, which saves then."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
