"""What `training.recipe` says and returns when stages fail or are stopped, with processes that stand for stages."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.training.small import write_config
from training.errors import TrainingError
from training.recipe import Ledger, Recipe, Running, costs, last_line
from training.record import Record, Session

# As torchrun 2.11 writes it, shortened.
TORCHRUN = """
E1127 15:46:37.680000 20678 site-packages/torch/distributed/elastic/multiprocessing/api.py:986] failed (exitcode: 1) local_rank: 0
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "site-packages/torch/distributed/run.py", line 994, in <module>
    main()
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
training.run FAILED
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""
OWN = """Traceback (most recent call last):
  File "training/run.py", line 1, in <module>
torch.OutOfMemoryError: CUDA out of memory.
"""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("", "no output"),
        ("stage_c: 4 steps\nstage_c: 100%\rstage_c needs prior.\n", "stage_c needs prior."),
        (
            f"batch_size is 5; 2 processes cannot divide it equally.{TORCHRUN}",
            "batch_size is 5; 2 processes cannot divide it equally.",
        ),
        (f"{OWN}{TORCHRUN}", "torch.OutOfMemoryError: CUDA out of memory."),
        (OWN, "torch.OutOfMemoryError: CUDA out of memory."),
        (
            f"W1127 15:46:37.4 1 torch/distributed/elastic/agent/server/api.py:9] Received 2 death signal\n"
            f"stage_c: stopped and saved at step 7; call again to go on.{TORCHRUN}",
            "stage_c: stopped and saved at step 7; call again to go on.",
        ),
        (TORCHRUN, "no output"),
    ],
)
def test_the_line_that_tells_why(output: str, line: str) -> None:
    assert last_line(output) == line


def standing_in(stage: str, code: str, log: Path) -> Running:
    """A process that stands for a stage: it says that it is ready, and runs the code."""
    file = log.open("a", encoding="utf-8")
    offset = file.tell()
    program = f"print('ready', flush=True)\n{code}"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=file, stderr=file)
    while "ready" not in log.read_text()[offset:]:
        time.sleep(0.01)
    return Running(stage, process, (), time.time(), {}, file, offset)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    made = Recipe(write_config(tmp_path), tmp_path, tmp_path / "run", at_once=2, deadline=0, copy_to=None)
    (tmp_path / "run").mkdir()
    return made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_decides_the_exit_code(
    recipe: Recipe, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if a stage's launcher, as torchrun does, ends with another."""
    log = tmp_path / "output.log"
    log.write_text("of an earlier call\n")
    ends = f"import signal, sys, time; signal.signal({int(number)}, lambda *_: sys.exit('saved')); time.sleep(60)"
    recipe.running.append(standing_in("stage_c", ends, log))
    timer = threading.Timer(0.5, recipe.interrupt, [number])
    timer.start()
    assert recipe.train() == 128 + number
    assert capsys.readouterr().out == "stage_c: saved\n"


def test_a_failed_stage_stops_the_others(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    recipe.running.append(standing_in("stage_b", waits, tmp_path / "b.log"))
    recipe.running.append(standing_in("stage_c", "import sys; sys.exit('stage_c: no memory')", tmp_path / "c.log"))
    assert recipe.train() == 1
    assert capsys.readouterr().out == "stage_c: no memory\nstage_b: ready\n"


OPTIONS = {"steps": 9, "batch_size": 4, "learning_rate": 1e-3, "accumulate": 3}
SESSION = Session("2026-11-27T00:00:00+00:00", "cpu", 1, 0, 9, {"train": 2.0})


def test_costs(tmp_path: Path) -> None:
    Record("stage_a", OPTIONS, [SESSION]).save(tmp_path / "stage_a")
    assert costs(tmp_path)["stages"]["stage_a"]["samples_per_step"] == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**OPTIONS, "batches": 2}, "unknown name batches"),
        ({"steps": 9}, "batch_size"),
        ({**OPTIONS, "accumulate": 0}, "accumulate is 0; it must be"),
        ({**OPTIONS, "batch_size": "4"}, "batch_size"),
    ],
)
def test_options_of_another_version_are_told_in_a_sentence(options: dict, words: str, tmp_path: Path) -> None:
    Record("stage_a", options, [SESSION]).save(tmp_path / "stage_a")
    with pytest.raises(TrainingError, match="Remove it to go on without its times") as error:
        costs(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'stage_a' / 'record.json'} is not of this version: ")
    assert words in str(error.value)


@pytest.mark.parametrize("entry", [{}, {"stage": "stage_a"}, {"stage": "stage_a", "seconds": 2.0}, "stage_a"])
def test_a_damaged_entry_of_the_ledger_is_told_in_a_sentence(entry: object, tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.processes.append(entry)
    ledger.save(tmp_path)
    with pytest.raises(TrainingError, match=r"recipe.json is damaged .*; remove it to go on without its times"):
        costs(tmp_path)
