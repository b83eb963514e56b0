"""All stages of a configuration by one call: each in a process of its own, several at once, and resumable stage by stage.

A stage starts when the earlier stages that write what it needs are finished and it has GPUs; one on several GPUs has them for
itself. Meanwhile, its step can be compiled ahead (`training.ahead`). Times are measured here and in `training.record`.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from training import compile_log
from training.configuration import read_configuration
from training.errors import TrainingError, writing
from training.options import Options, compiles
from training.record import FILE, Record, read_times, timestamp, write_times
from training.run import FINISHED
from training.stages import ORDER, STAGES, trained_by, waits_for
from training.values import check_values, kinds_of

ROOT = Path(__file__).parent.parent
LEDGER = "recipe.json"
POLL_SECONDS = 0.2
TRACEBACK = "Traceback (most recent call last):"
OF_LAUNCHER = re.compile(r"[IWE]\d{4} .*torch/distributed")
WRITE_SECONDS = 10.0
"""The ledger is written this often, so that a killed call loses less of its time."""
AT_MOST_AHEAD = 6
"""Processes, or pairs of them, that compile ahead at once, unless another number is given. Each keeps a core busy."""
LONGEST_AHEAD = 900.0
"""Seconds after which a process that compiles ahead is ended. It takes two minutes; a stage would wait for one that hangs."""
SECONDS_TO_END = 40.0
"""torchrun gives its processes 30 s to end."""


@dataclass
class Ledger:
    """The times of a whole training, kept in the training's folder.

    Attributes:
        calls: of `train_all`: ``started`` (UTC), ``seconds`` and ``gpus`` (their number).
        processes: of stages: ``stage``, ``started``, ``gpus`` (their entries in CUDA_VISIBLE_DEVICES) and ``seconds``, from the
            start to the end; and ``ahead``, true, if they only compiled the stage ahead.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    processes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, output: Path) -> "Ledger":
        """The ledger of a training's folder, or an empty one.

        Raises:
            TrainingError: it is damaged.
        """

        def made(content: Mapping[str, Any]) -> Ledger:
            ledger = cls(**content)
            # Raises an error for an entry that is no table, or lacks a name.
            for call in ledger.calls:
                itemgetter("started", "seconds", "gpus")(call)
            for process in ledger.processes:
                itemgetter("stage", "started", "seconds", "gpus")(process)
            return ledger

        return read_times(output / LEDGER, made) or cls()

    def save(self, output: Path) -> None:
        """Writes the ledger.

        Raises:
            TrainingError: it cannot be written.
        """
        write_times(output / LEDGER, asdict(self))


@dataclass
class Running:
    """A stage's process, or the launcher of its processes.

    Attributes:
        stage: its name.
        process: the process.
        gpus: the entries for CUDA_VISIBLE_DEVICES; none without a GPU.
        began: `time.time` when it was started.
        entry: its entry in the ledger.
        log: the file that its output is appended to; None: it writes to this process's.
        offset: bytes in that file before it was started.
    """

    stage: str
    process: subprocess.Popen[bytes]
    gpus: tuple[str, ...]
    began: float
    entry: dict[str, Any]
    log: TextIO | None
    offset: int = 0

    def last_line(self) -> str | None:
        """The last line of its output, see `last_line`; None if this process has the output."""
        if self.log is None:
            return None
        return last_line(Path(self.log.name).read_bytes()[self.offset :].decode(errors="replace"))


def ended(started: list[Running]) -> Iterator[tuple[Running, int]]:
    """Those whose processes have ended, with their exit codes; takes them from the list. Notes the seconds of all."""
    for one in list(started):
        code = one.process.poll()
        one.entry["seconds"] = time.time() - one.began
        if code is not None:
            started.remove(one)
            yield one, code


def last_line(output: str) -> str:
    """The last line of a stage's output that is not its launcher's: torchrun ends with log lines and a traceback of its own."""
    lines = output.splitlines()
    own = next((place for place, line in enumerate(lines) if "torch/distributed/run.py" in line), None)
    if own is not None:
        lines = lines[: max((place for place in range(own) if lines[place] == TRACEBACK), default=own)]
    lines = [line for line in lines if line.strip() and not OF_LAUNCHER.match(line)]
    return lines[-1].strip() if lines else "no output"


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def launcher(processes: int) -> list[str]:
    """What starts several processes of a module, after ``python -m``; nothing for one."""
    if processes < 2:
        return []
    return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]


class Recipe:
    """One call that trains all stages; see `train_all`."""

    def __init__(
        self,
        config: Path,
        data: Path,
        output: Path,
        *,
        at_once: int,
        deadline: float,
        copy_to: Path | None,
        compile_ahead: int = 0,
    ) -> None:
        self.config, self.data, self.output = config, data, output
        self.at_once, self.deadline, self.copy_to = at_once, deadline, copy_to
        tables = read_configuration(config)
        self.stages = [stage for stage in ORDER if stage in tables]
        self.wanted = {stage: tables[stage].get("options", {}).get("gpus", 1) for stage in self.stages}
        self.gpus = visible_gpus()
        self.running: list[Running] = []
        self.compile_ahead = compile_ahead if self.gpus else 0
        self.ahead: list[Running] = []
        # Stages to compile ahead, those whose turn comes first at the beginning.
        self.later = [
            stage
            for stage in self.stages
            if stage in STAGES and compiles(Options(**tables[stage]["options"]), torch.device("cuda"))
        ]
        self.code = 0
        self.stopping = False
        self.ledger = Ledger.load(output)
        self.began = self.written = time.time()
        self.call = {"started": timestamp(self.began), "seconds": 0.0, "gpus": len(self.gpus)}
        self.ledger.calls.append(self.call)

    def finished(self, stage: str) -> bool:
        return (self.output / stage / FINISHED).exists()

    @property
    def unfinished(self) -> list[str]:
        return [stage for stage in self.stages if not self.finished(stage)]

    def train(self) -> int:
        """Starts stages as they become ready, until all are finished or none can be started; returns the exit code."""
        try:
            while self.turn():
                self._write_ledger(WRITE_SECONDS)
                time.sleep(POLL_SECONDS)
        finally:
            self._end(self.ahead)
        self._write_ledger(0)
        return self.code

    def turn(self) -> bool:
        """Handles processes that have ended, and starts those that can start; returns whether a stage runs."""
        self._collect()
        self._collect_ahead()
        if not self.stopping and not self.code and time.time() < self.deadline:
            self._start_ready()
            self._start_ahead()
        else:
            self._end(self.ahead)
        return bool(self.running)

    def interrupt(self, number: int) -> None:
        """Stops because of a signal, which decides the exit code."""
        self.code = self.code or 128 + number
        self.stop(number)

    def stop(self, number: int) -> None:
        """Passes a signal on to all stages, which save and end, and starts no more.

        Ctrl-C reaches all processes of a terminal by itself; stages take two at once for one (`interruption`).
        """
        self.stopping = True
        for one in self.running:
            one.process.send_signal(number)

    def _start_ready(self) -> None:
        """Starts stages in their order, each as soon as those it waits for are finished and it has room, see `_room`.

        One without room reserves the GPUs that have the fewest stages, or later ones could start there again and again.
        """
        reserved: set[str] = set()
        for stage in self.unfinished:
            if len(self.running) >= self.at_once:
                return
            # A stage may be finished while its process has not ended yet. Its components are copied only after that.
            active = {one.stage for one in self.running}
            if stage in active or active.union(self.unfinished).intersection(waits_for(stage)):
                continue
            left = [gpu for gpu in self.gpus if gpu not in reserved]
            room, count = self._room(stage, left), self._count(stage)
            if len(room) < count:
                reserved.update(self._least_busy(left, count))
            else:
                self._start(stage, self._least_busy(room, count))

    def _count(self, stage: str) -> int:
        """The GPUs that a stage takes: as many as it wants, or all if there are fewer."""
        return min(self.wanted[stage], len(self.gpus))

    def _room(self, stage: str, gpus: list[str]) -> list[str]:
        """Those of the GPUs on which a stage may start.

        A stage on several GPUs waits for the slowest of them at every step, so it shares none. Others may share a GPU.
        """
        alone = self._count(stage) > 1
        taken = {gpu for one in self.running if alone or len(one.gpus) > 1 for gpu in one.gpus}
        return [gpu for gpu in gpus if gpu not in taken]

    def _start_ahead(self) -> None:
        """Starts to compile stages that cannot start yet, once each, as soon as there is a tokenizer."""
        active = {one.stage for one in self.running}
        if "tokenizer" in active.union(self.unfinished):  # the first stages start when its process has ended
            return
        while self.later and len(self.ahead) < self.compile_ahead:
            stage = self.later.pop(0)
            if not self.finished(stage) and stage not in active:
                gpus = self._least_busy(self.gpus, self._count(stage))
                log = compile_log.open_locked(self.output / stage)
                self.ahead.append(self._launch(stage, gpus, log, "--compile-only"))
                self.ahead[-1].entry["ahead"] = True

    def _start(self, stage: str, gpus: tuple[str, ...]) -> None:
        options, log = [], None
        if math.isfinite(self.deadline):
            options = ["--minutes", str(max(0.0, (self.deadline - time.time()) / 60))]
        if self.at_once > 1:
            folder = self.output / stage
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                log = (folder / "output.log").open("a", encoding="utf-8")
        one = self._launch(stage, gpus, log, *options)
        self.running.append(one)
        where = f" on GPU {', '.join(one.gpus)}" if one.gpus else ""
        say(f"{stage}: started{where}" + (f"; its output is in {log.name}" if log else ""))

    def _launch(self, stage: str, gpus: tuple[str, ...], log: TextIO | None, *options: str) -> Running:
        """Starts the process of a stage, or the launcher of its processes."""
        files = [self.config, stage, "--data", self.data, "--output", self.output]
        command = [sys.executable, "-m", *launcher(len(gpus)), "training.run", *map(str, files), *options]
        environment, offset = dict(os.environ), log.seek(0, os.SEEK_END) if log else 0
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        now = time.time()
        entry = {"stage": stage, "started": timestamp(now), "seconds": 0.0, "gpus": gpus}
        self.ledger.processes.append(entry)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return Running(stage, process, gpus, now, entry, log, offset)

    def _least_busy(self, gpus: list[str], count: int) -> tuple[str, ...]:
        """The ``count`` GPUs with the fewest stages; of those with equally many, those on which fewer are compiled ahead."""
        stages, ahead = ([gpu for one in those for gpu in one.gpus] for those in (self.running, self.ahead))
        return tuple(sorted(gpus, key=lambda gpu: (stages.count(gpu), ahead.count(gpu)))[:count])

    def _collect(self) -> None:
        """Handles stages whose processes have ended."""
        for one, code in ended(self.running):
            if one.log:
                one.log.close()
            if self.finished(one.stage):
                say(f"{one.stage}: finished after {one.entry['seconds']:.0f} s")
                if self.copy_to:
                    copy_stage(self.output, one.stage, self.copy_to)
                    self.ledger.save(self.copy_to)
            elif code == 0:
                say(f"{one.stage}: the time is up; call again to go on")
            else:
                self._failed(one, code)
            self._write_ledger(0)

    def _collect_ahead(self) -> None:
        """Handles processes that compiled ahead and have ended. Failures do no harm: the stages then compile."""
        late = [one for one in self.ahead if time.time() - one.began > LONGEST_AHEAD]
        self._end(late)
        for one in late:
            say(f"{one.stage}: not compiled ahead: it took longer than {LONGEST_AHEAD:.0f} s")
        for one, code in ended(self.ahead):
            compile_log.close(one.log)
            if code == 0:
                say(f"{one.stage}: compiled ahead after {one.entry['seconds']:.0f} s")
            elif not self.stopping:  # Ctrl-C reaches all processes of a terminal
                say(f"{one.stage}: not compiled ahead: {one.last_line()}")

    def _end(self, ahead: list[Running]) -> None:
        """Ends processes that compile ahead, and waits until they have ended."""
        for one in ahead:
            one.process.terminate()
        for one in list(ahead):
            try:
                one.process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()
            one.entry["seconds"] = time.time() - one.began
            self.ahead.remove(one)
            compile_log.close(one.log)

    def _failed(self, one: Running, code: int) -> None:
        """Keeps the exit code of the first stage that failed, and has the others save and end."""
        if one.log:
            said = one.last_line()
            say(said if said.startswith(f"{one.stage}: ") else f"{one.stage}: {said}")
        if not self.code:
            self.code = code if code > 0 else 128 - code
            if not self.stopping:
                self.stop(signal.SIGTERM)

    def _write_ledger(self, every: float) -> None:
        now = time.time()
        self.call["seconds"] = now - self.began
        if now - self.written >= every:
            self.written = now
            self.ledger.save(self.output)


def copy_stage(output: Path, stage: str, target: Path) -> None:
    """Copies what a finished stage made; the folder then has everything that the next stages need.

    Raises:
        TrainingError: a file cannot be written.
    """
    with writing(target):
        for component in trained_by(stage):
            replace_folder(output / "model" / component, target / "model" / component)
        (target / stage).mkdir(parents=True, exist_ok=True)
        for file in (output / stage).glob("*.json"):
            shutil.copy2(file, target / stage)
        samples = sorted((output / stage / "samples").glob("*.png"))[-1:]
        for file in (*samples, output / stage / FINISHED):  # the marker last
            shutil.copy2(file, target / stage)


def replace_folder(source: Path, target: Path) -> None:
    """Copies a folder over another one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def train_all(
    config: Path,
    data: Path,
    output: Path,
    *,
    at_once: int = 1,
    deadline: float = math.inf,
    copy_to: Path | None = None,
    compile_ahead: int = 0,
) -> int:
    """Trains every stage that the configuration has a table for and that is not finished.

    Ctrl-C and SIGTERM have all running stages save and end. If one fails, the others save and end too.

    Args:
        config, data, output: as `training.run` has them.
        at_once: how many stages may run at the same time. They are spread over the GPUs; a stage on several GPUs has them for
            itself.
        deadline: wall-clock time (`time.time`) at which stages save and end, and no more are started.
        copy_to: gets what each finished stage made, in the layout of ``output``, so that training can continue elsewhere. It gets
            nothing of a stage that was stopped: its weights without its checkpoint would be taken for the earlier stage's, and
            trained further from its first step on.
        compile_ahead: how many stages that cannot start yet may be compiled at the same time, if there are GPUs.

    Returns:
        0 if all stages are finished or the time is up; otherwise the exit code of the first stage that failed, or 128 plus the
        signal.

    Raises:
        TrainingError: the configuration or the ledger is damaged, or a file cannot be written.
    """
    recipe = Recipe(
        config, data, output, at_once=at_once, deadline=deadline, copy_to=copy_to, compile_ahead=compile_ahead
    )
    with passing_signals_to(recipe.interrupt):
        return recipe.train()


class passing_signals_to:
    """Calls ``stop`` with the number of every SIGINT and SIGTERM that comes while the block runs."""

    def __init__(self, stop: Callable[[int], None]) -> None:
        self.stop = stop
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def heard(number: int, frame: FrameType | None) -> None:
            self.stop(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, heard)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def process_seconds(entry: Mapping[str, Any]) -> float:
    """The seconds of all processes of a ledger's entry, added up. Each GPU has one process; without GPUs there is one."""
    return entry["seconds"] * max(1, len(entry["gpus"]))


def samples_per_step(record: Record, folder: Path) -> int:
    """The pictures of the native size in a step of a stage's last session. ``folder``: the stage's.

    Raises:
        TrainingError: its options are not those of this version.
    """
    try:
        check_values("the table of options", record.options, kinds_of(Options))
        return Options(**record.options).samples(record.sessions[-1].processes)
    except TrainingError as error:
        file = folder / FILE
        raise TrainingError(f"{file} is not of this version: {error} Remove it to go on without its times.") from error


def costs(output: Path) -> dict[str, Any]:
    """What a training cost: steps, samples and seconds, by stage and in all.

    Returns:
        ``seconds``: wall-clock time of all calls; ``process_seconds``: the sum over all stages' processes, whether they ran at
        once or not; ``calls``; and ``stages``: {stage: ``steps``, ``samples_per_step``, ``process_seconds``, ``ahead_seconds``
        (of the processes that only compiled it ahead, if any), ``seconds`` by phase, ``devices``, ``sessions``}.

    Raises:
        TrainingError: a record is damaged, or of a version with other options.
    """
    ledger = Ledger.load(output)
    stages: dict[str, Any] = {}
    for stage in ORDER:
        own = [one for one in ledger.processes if one["stage"] == stage]
        taken = sum(process_seconds(one) for one in own if not one.get("ahead"))
        ahead = sum(process_seconds(one) for one in own if one.get("ahead"))
        record = Record.load(output / stage)
        if not taken and not ahead and record is None:
            continue
        stages[stage] = {"process_seconds": taken}
        if ahead:
            stages[stage]["ahead_seconds"] = ahead
        if record is not None and record.sessions:
            stages[stage] |= {
                "steps": record.steps,
                "samples_per_step": samples_per_step(record, output / stage),
                "seconds": record.seconds,
                "devices": sorted({session.device for session in record.sessions}),
                "sessions": len(record.sessions),
            }
    return {
        "seconds": sum(call["seconds"] for call in ledger.calls),
        "process_seconds": sum(map(process_seconds, ledger.processes)),
        "calls": ledger.calls,
        "stages": stages,
    }


def costs_table(made: Mapping[str, Any]) -> str:
    """`costs` as a Markdown table: minutes by stage, with the steps, and in all."""
    rows = [
        ["stage", "steps", "samples a step", "minutes", "of these training", "device"],
        ["---", "---:", "---:", "---:", "---:", "---"],
    ]
    for stage, one in made["stages"].items():
        steps, samples = (f"{one[name]:,}" if name in one else "" for name in ("steps", "samples_per_step"))
        training = f"{one['seconds'].get('train', 0) / 60:.1f}" if "seconds" in one else ""
        devices = ", ".join(one.get("devices", ()))
        rows.append([stage, steps, samples, f"{one['process_seconds'] / 60:.1f}", training, devices])
    ahead = sum(one.get("ahead_seconds", 0) for one in made["stages"].values())
    if ahead:
        rows.append(["compiled ahead", "", "", f"{ahead / 60:.1f}", "", ""])
    rows.append(["all stages", "", "", f"{made['process_seconds'] / 60:.1f}", "", ""])
    calls = f"{len(made['calls'])} call{'s' * (len(made['calls']) != 1)}"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", f"Wall-clock time: {made['seconds'] / 60:.1f} minutes in {calls}."])
