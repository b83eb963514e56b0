"""What the commands that train have in common: options, log lines, errors as a sentence, and exit codes."""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import transformers

from training.errors import TrainingError
from training.interruption import Stopped
from training.values import Range


class InRange(argparse.Action):
    """Stores a number, which must be finite and in the range ``allowed``."""

    def __init__(self, option_strings: list[str], dest: str, *, allowed: Range, **others: Any) -> None:
        super().__init__(option_strings, dest, **others)
        self.allowed = allowed

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        try:
            self.allowed.check(str(option), value)
        except TrainingError as error:
            parser.error(str(error).removesuffix("."))
        setattr(namespace, self.dest, value)


class AtLeastOne(InRange):
    """Stores a whole number, which must be at least 1."""

    def __init__(self, option_strings: list[str], dest: str, **others: Any) -> None:
        super().__init__(option_strings, dest, type=int, allowed=Range(1), **others)


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--minutes``."""
    parser.add_argument(
        "--minutes",
        action=InRange,
        type=float,
        allowed=Range(0),
        default=math.inf,
        help="save and stop after this time; call again to go on",
    )


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--steps``."""
    parser.add_argument(
        "--steps",
        action=AtLeastOne,
        help="number of steps instead of the configuration's; warm-up and decay are scaled",
    )


def run(train: Callable[[], None], name: str = "") -> int:
    """Runs a training, and says in a sentence on stderr why it ended early.

    Args:
        train: the training.
        name: of what is trained; begins the sentences about a training that was stopped.

    Returns:
        The exit code: 0; 1 after a `TrainingError`; 128 plus the signal's number if the training was stopped and has saved; 130
        if Ctrl-C came before it could.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it logs six lines a checkpoint
    # It names the scratch folder that a component is saved to.
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take a moment
    try:
        train()
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Stopped as stopped:
        sys.stderr.write(_begun(name, f"stopped and saved at step {stopped.step}; call again to go on.\n"))
        return 128 + stopped.signal
    except KeyboardInterrupt:
        sys.stderr.write(_begun(name, "interrupted; the last checkpoint is kept. Call again to go on.\n"))
        return 130
    return 0


def _begun(name: str, sentence: str) -> str:
    return f"{name}: {sentence}" if name else sentence[0].upper() + sentence[1:]
