"""How long each stage trained, on what, and for how many steps: measured by the program, and kept beside the checkpoints."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from training.errors import FILE_ERRORS, TrainingError, summary, writing
from training.files import whole_file

T = TypeVar("T")

FILE = "record.json"


@dataclass
class Session:
    """One run of a stage's process, from its start to its end or to the last time that it was recorded.

    Attributes:
        started: date and time in UTC, ISO 8601.
        device: name of the GPU, or "cpu".
        processes: how many trained together.
        first, last: the number of optimizer steps that were done before and after.
        seconds: wall-clock time by phase: "prepare" (loading, building, encoding), "compile" (the first step), "train",
            "evaluate" and "save".
    """

    started: str
    device: str
    processes: int
    first: int
    last: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """The record of one stage.

    Attributes:
        stage: its name.
        options: its options, see `options.Options`.
        sessions: every run of its process.
    """

    stage: str
    options: dict[str, Any]
    sessions: list[Session] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return self.sessions[-1].last if self.sessions else 0

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock time of all sessions by phase."""
        total: dict[str, float] = {}
        for session in self.sessions:
            for phase, seconds in session.seconds.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

    @classmethod
    def load(cls, folder: Path) -> "Record | None":
        """The record in a stage's folder; None if there is none.

        Raises:
            TrainingError: it is damaged.
        """

        def made(content: Mapping[str, Any]) -> Record:
            sessions = [Session(**session) for session in content["sessions"]]
            return cls(content["stage"], content["options"], sessions)

        return read_times(folder / FILE, made)

    def save(self, folder: Path) -> None:
        """Writes the record to a stage's folder.

        Raises:
            TrainingError: it cannot be written.
        """
        write_times(folder / FILE, asdict(self))


def read_times(file: Path, make: Callable[[Any], T]) -> T | None:
    """The result of ``make`` for a JSON file's content; None if there is no file.

    Raises:
        TrainingError: the file is damaged.
    """
    try:
        return make(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except FILE_ERRORS as error:
        raise TrainingError(f"{file} is damaged ({summary(error)}); remove it to go on without its times.") from error


def write_times(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, which is complete or absent.

    Raises:
        TrainingError: it cannot be written.
    """
    with writing(file), whole_file(file) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Clock:
    """Measures the phases of one session.

    Args:
        session: gets the seconds.
        began: `time.time` when the session's first phase began.
    """

    def __init__(self, session: Session, began: float) -> None:
        self.session, self.last = session, began

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap to ``phase``."""
        now = time.time()
        self.session.seconds[phase] = self.session.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def timestamp(seconds: float) -> str:
    """A `time.time` in UTC, ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
