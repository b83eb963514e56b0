"""What the commands that train have in common: log lines, errors as a sentence, and exit codes."""

import logging
import sys
from collections.abc import Callable

from training.errors import TrainingError
from training.interruption import Stopped


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
