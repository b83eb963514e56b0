"""The command line of ``scripts/train-stage-c``; several processes start this module, see docs/training.md."""

import argparse
import logging
import sys
import time
from pathlib import Path

from training import command
from training.encoded.recipe import read_recipe
from training.encoded.run import train_stage_c


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/train-stage-c", description="Train Stage C on encoded pictures.")
    parser.add_argument("pictures", type=Path, help="a folder that scripts/encode-pictures has made")
    parser.add_argument("--config", type=Path, required=True, help="a TOML file, such as training/published.toml")
    parser.add_argument("--output", type=Path, required=True, help="the training's folder")
    parser.add_argument(
        "--weights", type=Path, help="a model folder whose Stage C is trained further (default: a new one)"
    )
    parser.add_argument("--lite", action="store_true", help="of the published repositories, the smaller Stage C")
    command.add_minutes(parser)
    command.add_steps(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; ``arguments`` default to the process's. Returns the exit code."""
    options = parse(arguments)
    deadline = time.time() + 60 * options.minutes

    def work() -> None:
        finished = train_stage_c(
            read_recipe(options.config),
            options.pictures,
            options.output,
            weights=options.weights,
            lite=options.lite,
            steps=options.steps,
            deadline=deadline,
        )
        if not finished:
            logging.getLogger(__name__).info("Stopped at the time limit; call again to go on.")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
