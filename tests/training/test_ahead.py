"""Compiling a stage ahead: with untrained networks, and without a trace but torch's own cache."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch._aot_autograd import autograd_cache

from tests.training.nursery import Nursery
from tests.training.small import train, write_config, write_pictures
from training import compile_log
from training.ahead import scratch
from training.recipe import Ledger, costs, costs_table, train_all
from training.run import FINISHED
from training.stages import STAGES
from training.trainer import Trainer


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and a configuration; in ``run``, the tokenizer."""
    folder = tmp_path_factory.mktemp("ahead")
    write_config(folder, "vision.task.naming = 0.0")
    assert train(folder / "config.toml", "tokenizer", write_pictures(folder / "pictures", 12), folder / "run") == 0
    return folder


def states(folder: Path) -> dict[Path, tuple[int, int]]:
    """All files and folders, with sizes and times of change."""
    return {file: ((about := file.stat()).st_size, about.st_mtime_ns) for file in folder.rglob("*")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_of_every_stage_leaves_no_trace(
    stage: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing is trained yet but the tokenizer."""
    steps, step = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: steps.append(self.batch_size) or step(self))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = states(begun)
    assert train(begun / "config.toml", stage, begun / "pictures", begun / "run", "--compile-only") == 0
    assert states(begun) == before
    assert not list(tmp_path.iterdir())
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("stage", "changes", "output", "words"),
    [
        ("stage_c", "", "none", "none/model lacks the tokenizer: run the stage tokenizer first."),
        ("tokenizer", "", "run", "tokenizer has no network that could be compiled."),
        ("stage_c", "- effnet", "run", "stage_c needs effnet, and the configuration has no [effnet]."),
        ("stage_c", "- stage_c", "run", "The configuration has no table [stage_c]."),
    ],
)
def test_what_is_missing_is_told(
    stage: str,
    changes: str,
    output: str,
    words: str,
    begun: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, changes)
    assert train(config, stage, begun / "pictures", begun / output, "--compile-only") == 1
    assert capsys.readouterr().err.endswith(f"{words}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_temporary_folder(number: int) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    folders = []

    def ended() -> None:
        with scratch() as folder:
            (folder / "file").touch()
            folders.append(folder)
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit, match=str(128 + number)):
        ended()
    assert not folders[0].exists()
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
def test_a_stage_waits_only_while_the_process_lives(tmp_path: Path) -> None:
    """Also if the recipe has ended; and not at all for one that has ended already, or was never there."""
    compile_log.wait_until_compiled(tmp_path)
    assert not list(tmp_path.iterdir())
    log = compile_log.open_locked(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"], stdout=log) as process:
        log.close()
        compile_log.wait_until_compiled(tmp_path)
        assert process.wait(0.5) == 0
    compile_log.wait_until_compiled(tmp_path)


def test_a_stage_does_not_wait_for_compilers_that_live_on(tmp_path: Path) -> None:
    log = compile_log.open_locked(tmp_path)
    with subprocess.Popen(["sleep", "60"], stdout=log) as compiler:
        compile_log.close(log)
        compile_log.wait_until_compiled(tmp_path)
        assert compiler.poll() is None
        compiler.kill()


class KeyFound(BaseException):
    """Raised instead of compiling, which takes minutes on a CPU."""


def train_anew(*arguments: Any) -> int:
    """`train`, as in a process that has compiled nothing yet."""
    torch._dynamo.reset()
    return train(*arguments)


@pytest.mark.slow
def test_stages_look_for_what_was_compiled_ahead(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's keys are the same, though a stage has more pictures, and networks of earlier stages that were trained."""
    compiled = write_config(
        tmp_path, "\n".join(["vision.task.naming = 0.0", *(f"{stage}.options.compile = true" for stage in STAGES)])
    )
    data, output, keys = begun / "pictures", shutil.copytree(begun / "run", tmp_path / "run"), []
    original = autograd_cache.autograd_cache_key

    def found(*arguments: Any) -> None:
        keys.append(original(*arguments)[0])
        raise KeyFound

    def key(stage: str, *options: str) -> str:
        keys.clear()
        with pytest.raises(KeyFound):
            train_anew(compiled, stage, data, output, *options)
        return keys[0]

    monkeypatch.setattr(autograd_cache, "autograd_cache_key", found)
    longest = ("stage_a", "clip", "semantic", "stage_b", "stage_c")
    ahead = {stage: key(stage, "--compile-only") for stage in longest}
    assert len(set(ahead.values())) == len(longest)
    for stage in longest:
        assert key(stage) == ahead[stage], stage
        if stage != longest[-1]:
            assert train_anew(begun / "config.toml", stage, data, output) == 0


@pytest.mark.slow
def test_a_recipe_compiles_ahead(
    begun: Path,
    tmp_path: Path,
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With processes that compute on the CPU."""
    others = [f"- {stage}" for stage in STAGES if stage not in ("stage_a", "clip")]
    config, output = write_config(tmp_path, "\n".join(others)), tmp_path / "run"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(sys, "executable", str(nursery.python))
    assert train_all(config, begun / "pictures", output, compile_ahead=3) == 0
    assert all((output / stage / FINISHED).exists() for stage in ("tokenizer", "stage_a", "clip"))
    (ahead,) = (one for one in Ledger.load(output).processes if one.get("ahead"))
    assert (ahead["stage"], ahead["gpus"]) == ("clip", ["7"])
    assert "the first step was taken ahead" in (output / "clip" / compile_log.NAME).read_text()
    assert "clip: compiled ahead after " in capfd.readouterr().out
    made = costs(output)
    assert made["stages"]["clip"]["ahead_seconds"] == ahead["seconds"] > 0
    assert made["process_seconds"] == pytest.approx(
        sum(one["process_seconds"] + one.get("ahead_seconds", 0) for one in made["stages"].values())
    )
    assert any(line.startswith("| compiled ahead |  |  | ") for line in costs_table(made).splitlines())
