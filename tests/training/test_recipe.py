"""What `training.recipe` says and returns when stages fail or are stopped, with processes that stand for stages."""

import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.training.small import write_config
from training import recipe as recipe_module
from training.errors import TrainingError
from training.recipe import Ledger, Recipe, Running, costs, costs_table, last_line
from training.record import Record, Session
from training.run import FINISHED
from training.stages import ORDER, STAGES, waits_for

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


@pytest.mark.slow
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


def test_a_stage_that_was_stopped_leaves_no_copy(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it has written its components: elsewhere, without its checkpoint, its steps would begin anew with these weights."""
    recipe.copy_to = tmp_path / "kept"
    for stage, component in (("stage_a", "vqgan"), ("stage_c", "prior")):
        (recipe.output / "model" / component).mkdir(parents=True)
        recipe.running.append(standing_in(stage, "", tmp_path / f"{stage}.log"))
    (recipe.output / "stage_a").mkdir()
    (recipe.output / "stage_a" / FINISHED).touch()
    assert recipe.train() == 0
    kept = {str(path.relative_to(recipe.copy_to)) for path in recipe.copy_to.rglob("*")}
    assert kept == {"model", "model/vqgan", "recipe.json", "stage_a", "stage_a/finished"}
    assert "stage_c: the time is up; call again to go on\n" in capsys.readouterr().out


# Stands for Python: each stage finishes soon, and ends a little later; what compiles ahead does as the file ``ahead`` says.
# All calls are in ``calls``, with their GPUs.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
while [ "$1" != training.run ]; do shift; done
echo "$3 $CUDA_VISIBLE_DEVICES $8" >> "$here/calls"
case "$*" in
*--compile-only*) . "$here/ahead" ;;
*) sleep 0.2; mkdir -p "$7/$3"; touch "$7/$3/finished"; sleep 0.3 ;;
esac
"""
STAGES_OF_IT = ("tokenizer", "stage_a", "clip", "semantic", "stage_b", "previewer")
REMOVED = "\n".join(f"- {stage}" for stage in STAGES if stage not in STAGES_OF_IT)
CHANGES = f"""
semantic.options.gpus = 2
previewer.options.compile = false
{REMOVED}
"""


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recipe]:
    """Makes a recipe that compiles ahead, two at once, on two of three GPUs' stages; the argument is the file ``ahead``."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")

    def make(script: str) -> Recipe:
        (tmp_path / "ahead").write_text(script)
        files = (write_config(tmp_path, CHANGES), tmp_path, tmp_path / "run")
        (tmp_path / "run").mkdir()
        return Recipe(*files, at_once=2, deadline=math.inf, copy_to=None, compile_ahead=2)

    return make


def calls(folder: Path) -> list[str]:
    return [line.rstrip() for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.slow
def test_later_stages_are_compiled_ahead(
    ahead: Callable[[str], Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that compile and cannot start yet, after the tokenizer, on the GPUs that are least busy."""
    recipe = ahead("sleep 0.1")
    assert recipe.train() == 0
    made = calls(tmp_path)
    assert made[0] == "tokenizer 4"
    assert sorted(made[1:5]) == ["clip 7", "semantic 9,4 --compile-only", "stage_a 4", "stage_b 9 --compile-only"]
    assert [line for line in made[5:] if "compile" in line] == []
    said = capsys.readouterr().out
    assert all(f"{stage}: compiled ahead after 0 s\n" in said for stage in ("semantic", "stage_b"))
    assert [one["stage"] for one in recipe.ledger.processes if one.get("ahead")] == ["semantic", "stage_b"]
    made = costs(tmp_path / "run")
    assert made["stages"]["stage_b"]["ahead_seconds"] < made["stages"]["stage_b"]["process_seconds"]
    assert made["process_seconds"] == pytest.approx(
        sum(one["process_seconds"] + one.get("ahead_seconds", 0) for one in made["stages"].values())
    )
    assert costs_table(made).splitlines()[-4].startswith("| compiled ahead |  |  | 0.0 |")


@pytest.mark.slow
def test_a_stage_that_could_not_be_compiled_ahead_is_trained(
    ahead: Callable[[str], Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ahead("echo no memory; exit 1").train() == 0
    said = capsys.readouterr().out.splitlines()
    assert "semantic: not compiled ahead: no memory" in said
    assert all((tmp_path / "run" / stage / "finished").exists() for stage in STAGES_OF_IT)


@pytest.mark.slow
def test_a_stage_starts_though_it_is_still_compiled_ahead(ahead: Callable[[str], Recipe], tmp_path: Path) -> None:
    """It waits itself, before its first step. What still compiles at the end is ended."""
    recipe = ahead("echo $$ >> $here/pids; exec sleep 60")
    began = time.time()
    assert recipe.train() == 0
    assert time.time() - began < 30
    assert len(calls(tmp_path)) == len(STAGES_OF_IT) + 2
    assert all(not Path("/proc", pid).exists() for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.slow
def test_what_hangs_is_ended(
    ahead: Callable[[str], Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the stage would wait for it forever."""
    monkeypatch.setattr(recipe_module, "LONGEST_AHEAD", 0.1)
    made = ahead("exec sleep 60")
    assert made.train() == 0
    assert "semantic: not compiled ahead: it took longer than 0 s\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("why", ["signal", "deadline", "failure"])
def test_what_compiles_ahead_ends_with_the_recipe(why: str, ahead: Callable[[str], Recipe], tmp_path: Path) -> None:
    """At the deadline, though the stages still run."""
    recipe, pids, end = ahead("echo $$ >> $here/pids; exec sleep 60"), tmp_path / "pids", tmp_path / "end"
    lasting = "*) [ $3 = tokenizer ] || while :; do [ -e $here/end ] && exit 3; sleep 0.1; done;"
    (tmp_path / "python").write_text(PYTHON.replace("*) sleep 0.2;", lasting))

    def alive() -> list[str]:
        return [pid for pid in pids.read_text().split() if Path("/proc", pid).exists()]

    def stop() -> None:
        while not pids.exists() or len(pids.read_text().split()) < 2:
            time.sleep(0.05)
        if why == "signal":
            recipe.interrupt(signal.SIGTERM)
            return
        if why == "deadline":
            recipe.deadline = 0
            while alive():
                time.sleep(0.05)
        end.touch()

    threading.Thread(target=stop, daemon=True).start()
    assert recipe.train() == (128 + signal.SIGTERM if why == "signal" else 3)
    assert recipe.ahead == []
    assert not alive()


@pytest.mark.slow
def test_nothing_is_compiled_ahead_without_a_gpu(
    ahead: Callable[[str], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ahead("exit 1").train() == 0
    assert not any("compile" in line for line in calls(tmp_path))


@pytest.fixture
def lasting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Recipe]]:
    """Makes a recipe whose stages last until `end`, all but the tokenizer, which is finished.

    Its arguments: the GPUs, the GPUs that stages want (1 if not given), and the stages that may run at once.
    """
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    made: list[Recipe] = []

    def make(gpus: str, wanted: Mapping[str, int], at_once: int = 6) -> Recipe:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        changes = "\n".join(f"{stage}.options.gpus = {count}" for stage, count in wanted.items())
        output = tmp_path / str(len(made))
        (output / "tokenizer").mkdir(parents=True)
        (output / "tokenizer" / FINISHED).touch()
        config = write_config(tmp_path, changes)
        made.append(Recipe(config, tmp_path, output, at_once=at_once, deadline=math.inf, copy_to=None))
        return made[-1]

    yield make
    for one in (running for recipe in made for running in recipe.running):
        one.process.kill()
        one.process.wait()


def end(recipe: Recipe, *stages: str) -> dict[str, str]:
    """Finishes stages; returns what runs after that, with its GPUs."""
    for one in recipe.running:
        if one.stage in stages:
            (recipe.output / one.stage).mkdir(exist_ok=True)
            (recipe.output / one.stage / FINISHED).touch()
            one.process.kill()
            one.process.wait()
    recipe.turn()
    return {one.stage: "".join(one.gpus) for one in recipe.running}


IN_TWO = dict.fromkeys(("semantic", "stage_b", "stage_c"), 2)


def test_a_stage_on_several_gpus_has_them_for_itself(lasting: Callable[..., Recipe]) -> None:
    """Others share what is left. The GPUs and stages are the miniature's."""
    recipe = lasting("0,1,2,3", IN_TWO)
    assert end(recipe) == {"stage_a": "0", "clip": "1"}
    assert end(recipe, "clip") == {"stage_a": "0", "vision": "1"}
    assert end(recipe, "stage_a") == {"vision": "1", "semantic": "02"}
    assert end(recipe, "semantic") == {"vision": "1", "stage_b": "02", "previewer": "3"}
    assert end(recipe, "vision") == {"stage_b": "02", "previewer": "3"}
    assert end(recipe, "previewer") == {"stage_b": "02", "stage_c": "13"}
    others = {"controlnet_canny": "1", "controlnet_inpainting": "3", "ip_adapter": "1", "distil_c": "3"}
    assert end(recipe, "stage_c") == {"stage_b": "02", **others}
    assert end(recipe, "stage_b") == {**others, "distil_b": "0"}


def test_a_stage_for_several_gpus_waits_until_they_are_free(lasting: Callable[..., Recipe]) -> None:
    """Later stages do not start on those that it waits for, though they could share them; but on others they do."""

    def begun(gpus: str) -> Recipe:
        recipe = lasting(gpus, {"ip_adapter": 2})
        for stage in ("stage_a", "clip", "vision", "semantic", "stage_b", "stage_c"):
            assert stage in end(recipe)
            end(recipe, stage)
        return recipe

    two, three = begun("0,1"), begun("0,1,2")
    assert end(two, "previewer") == {"distil_b": "0", "controlnet_canny": "1", "controlnet_inpainting": "0"}
    assert end(two, "controlnet_canny") == {"distil_b": "0", "controlnet_inpainting": "0"}
    assert end(two, "distil_b") == {"controlnet_inpainting": "0"}
    assert end(two, "controlnet_inpainting") == {"ip_adapter": "01"}
    assert end(two, "ip_adapter") == {"distil_c": "0"}
    running = {"distil_b": "0", "controlnet_canny": "1", "controlnet_inpainting": "2", "distil_c": "2"}
    assert end(three, "previewer") == running


def test_several_gpus_are_all_if_there_are_fewer(lasting: Callable[..., Recipe]) -> None:
    """On one, a stage shares it as others do; without any, all run on the CPU."""
    for gpus, all_of_them in (("0,1", "01"), ("0", "0"), ("", "")):
        recipe = lasting(gpus, {"stage_a": 3})
        shares = {"clip": all_of_them} if len(all_of_them) < 2 else {}
        assert end(recipe) == {"stage_a": all_of_them, **shares}


@pytest.mark.slow
@given(
    st.lists(st.sampled_from("0123456"), unique=True, max_size=5),
    st.dictionaries(st.sampled_from(list(STAGES)), st.integers(2, 6), max_size=6),
    st.integers(1, 6),
    st.randoms(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_stage_has_its_turn(
    lasting: Callable[..., Recipe], gpus: list[str], wanted: dict[str, int], at_once: int, draws: random.Random
) -> None:
    """In whatever order stages end. While the first one in line waits, no later one makes the GPUs that it waits for fuller."""
    recipe = lasting(",".join(gpus), wanted, at_once)
    first, before, earlier = "", math.inf, set()
    running = end(recipe)
    while recipe.unfinished:
        assert 0 < len(running) <= at_once
        loads = {gpu: sum(gpu in one for one in running.values()) for gpu in gpus}
        for stage, own in running.items():
            assert len(own) == min(wanted.get(stage, 1), len(gpus))
            assert len(own) < 2 or all(loads[gpu] == 1 for gpu in own)
        blocked = set(recipe.unfinished)
        waiting = [one for one in recipe.unfinished if one not in running and not blocked.intersection(waits_for(one))]
        if waiting:
            count = min(wanted.get(waiting[0], 1), len(gpus))
            load = sum(sorted(loads.values())[:count])
            ahead = set(ORDER[: ORDER.index(waiting[0])]).intersection(running)
            assert waiting[0] != first or load <= before or ahead - earlier
            first, before, earlier = waiting[0], load, ahead
            alone = {gpu for own in running.values() if len(own) > 1 for gpu in own}
            room = [gpu for gpu in gpus if (loads[gpu] == 0 if count > 1 else gpu not in alone)]
            assert len(running) == at_once or len(room) < count
        running = end(recipe, draws.choice(list(running)))
    assert not running


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
