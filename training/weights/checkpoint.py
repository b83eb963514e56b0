"""Checkpoints: the state of a training on disk."""

import logging
import shutil
from pathlib import Path

from accelerate import Accelerator

from training.errors import FILE_ERRORS, TrainingError, summary, writing

logger = logging.getLogger(__name__)


class Progress:
    """The number of optimizer steps that are done; saved with every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def has_checkpoint(folder: Path) -> bool:
    """Whether a stage's folder has a checkpoint to resume from."""
    return any((folder / name).is_dir() for name in ("state", "state.new"))


class Checkpoint:
    """The checkpoint of one stage. A complete one is on disk at every moment, even while a new one is written.

    A new one is written to ``state.part``, renamed to ``state.new`` when it is complete, and then replaces ``state``. If the
    process is killed in between, the next start uses ``state.new``.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.path, self.new, self.part = (folder / name for name in ("state", "state.new", "state.part"))

    def _put_in_place(self) -> None:
        if self.new.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
            self.new.rename(self.path)

    def _read(self, folder: Path) -> int:
        """Loads what `_write` wrote. Returns the number of processes that wrote it."""
        self.accelerator.load_state(str(folder))
        return sum(1 for _ in folder.glob("random_states_*.pkl"))

    def _write(self, folder: Path) -> None:
        """Writes all that resuming needs into a new folder."""
        self.accelerator.save_state(str(folder), safe_serialization=True)

    def load(self) -> bool:
        """Loads the newest checkpoint; False if there is none.

        Raises:
            TrainingError: it cannot be read, or does not fit the networks.
        """
        if self.accelerator.is_main_process:
            shutil.rmtree(self.part, ignore_errors=True)
            self._put_in_place()
        self.accelerator.wait_for_everyone()
        if not self.path.is_dir():
            return False
        try:
            writers = self._read(self.path)
        except FILE_ERRORS as error:
            raise TrainingError(
                f"The checkpoint {self.path} does not fit this configuration, or is damaged ({summary(error)}); move it away "
                "to start the stage again."
            ) from error
        readers = self.accelerator.num_processes
        if writers != readers and self.accelerator.is_main_process:
            logger.warning(
                "The checkpoint is of %d processes, and %d continue it: they see other batches than it would have seen.",
                writers,
                readers,
            )
        return True

    def save(self) -> None:
        """Writes a checkpoint; every process writes its part.

        Raises:
            TrainingError: it could not be written; the previous one is kept.
        """
        if self.accelerator.is_main_process:
            shutil.rmtree(self.part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(self.part):
            self._write(self.part)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.part.rename(self.new)
            self._put_in_place()
        self.accelerator.wait_for_everyone()
