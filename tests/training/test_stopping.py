"""However a training ends, what it leaves is complete, and it goes on to the same weights."""

import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training.nursery import Nursery
from tests.training.small import train, write_config, write_pictures
from training import run
from training.files import whole_file, write_components

WEIGHTS = Path("model") / "vqgan" / "diffusion_pytorch_model.safetensors"
CHANGES = """
stage_a.options.steps = 12
stage_a.options.evaluate_every = 3
stage_a.options.checkpoint_seconds = 0.0
data.size = 64
- data.other_sizes
stage_a.task.crop = 32
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a configuration that saves after every step, and in ``run`` a tokenizer; in ``whole``, Stage A too."""
    folder = tmp_path_factory.mktemp("stopping")
    pictures, config = write_pictures(folder / "pictures", 12, size=64), write_config(folder, CHANGES)
    assert train(config, "tokenizer", pictures, folder / "run") == 0
    shutil.copytree(folder / "run", folder / "whole")
    assert train(config, "stage_a", pictures, folder / "whole") == 0
    return folder


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def again(begun: Path, output: Path, *options: str) -> int:
    return train(begun / "config.toml", "stage_a", begun / "pictures", output, *options)


def in_child(
    nursery: Nursery,
    config: Path,
    output: Path,
    number: int = 0,
    *,
    there: Path | None = None,
    pause: float = 0.0,
) -> tuple[int, list[str]]:
    """Trains Stage A in a process of its own; sends it a signal some time after a file is there.

    Returns its exit code, minus the signal that ended it, and what it wrote to stderr.
    """
    errors = output.with_suffix(".err")
    files = [config, "stage_a", "--data", config.parent / "pictures", "--output", output]
    child = nursery.start("-m", "training.run", *files, errors=errors)
    while there and not there.exists():
        time.sleep(0.01)
    if number:
        time.sleep(pause)
        os.kill(child.pid, number)
    return child.wait(), errors.read_text().splitlines()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(begun: Path, tmp_path: Path, nursery: Nursery) -> None:
    """SIGKILL while it does nothing but train a step, save, evaluate and write the component, again and again."""
    output, whole = (shutil.copytree(begun / "run", tmp_path / name) for name in ("run", "whole"))
    # By a child too: with another number of threads than here, the last bits of sums differ.
    start = time.monotonic()
    assert in_child(nursery, begun / "config.toml", whole)[0] == 0
    taken = time.monotonic() - start
    draws = random.Random(0)
    pauses = [draws.uniform(0.1, 0.8) * taken for _ in range(5)]
    codes = [in_child(nursery, begun / "config.toml", output, signal.SIGKILL, pause=pause)[0] for pause in pauses]
    assert -signal.SIGKILL in codes
    code, said = in_child(nursery, begun / "config.toml", output)
    assert code == 0, said
    assert digest(output / WEIGHTS) == digest(whole / WEIGHTS)
    assert not list(output.rglob("*.part"))
    assert not (output / "stage_a" / "state.new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(begun: Path, tmp_path: Path, nursery: Nursery, number: int, code: int) -> None:
    output = shutil.copytree(begun / "run", tmp_path / "run")
    shutil.copytree(begun / "pictures", tmp_path / "pictures")
    lasting = "stage_a.options = { steps = 100000, batch_size = 2, learning_rate = 1e-3, evaluate_every = 5 }"
    config = write_config(tmp_path, CHANGES + lasting)
    sheet = output / "stage_a" / "samples" / "000005.png"
    ended, said = in_child(nursery, config, output, number, there=sheet, pause=0.1)
    assert ended == code
    assert said[-1].startswith("stage_a: stopped and saved at step ")
    assert not any("Traceback" in line for line in said)
    assert (output / "stage_a" / "state").is_dir()
    assert not (output / "stage_a" / run.FINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["all", "half", "nothing"])
def test_killed_between_two_checkpoints(begun: Path, tmp_path: Path, removed: str) -> None:
    """The new one is complete, and the old one is there still, or half, or no more."""
    output = shutil.copytree(begun / "run", tmp_path / "run")
    assert again(begun, output, "--minutes", "0") == 0
    shutil.move(output / "stage_a" / "state", output / "stage_a" / "state.old")
    shutil.copytree(begun / "whole" / "stage_a" / "state", output / "stage_a" / "state.new")
    (output / "stage_a" / "state.part").mkdir()
    shutil.move(output / "stage_a" / "state.old", output / "stage_a" / "state")
    if removed == "half":
        (output / "stage_a" / "state" / "model.safetensors").unlink()
    elif removed == "all":
        shutil.rmtree(output / "stage_a" / "state")
    assert again(begun, output, "--minutes", "0") == 0  # there is nothing left to do, and no time
    assert digest(output / WEIGHTS) == digest(begun / "whole" / WEIGHTS)
    assert sorted(path.name for path in (output / "stage_a").iterdir() if "state" in path.name) == ["state"]


@pytest.mark.slow
def test_a_cut_component_does_not_matter_to_what_resumes(begun: Path, tmp_path: Path) -> None:
    output = shutil.copytree(begun / "whole", tmp_path / "run")
    (output / WEIGHTS).write_bytes((output / WEIGHTS).read_bytes()[:1000])
    assert again(begun, output) == 0
    assert digest(output / WEIGHTS) == digest(begun / "whole" / WEIGHTS)


@pytest.mark.slow
def test_a_checkpoint_of_other_sizes_is_named(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shutil.copytree(begun / "whole", tmp_path / "run")
    shutil.rmtree(output / "model" / "vqgan")
    config = write_config(tmp_path, CHANGES + "vqgan.embed_dim = 24")
    assert train(config, "stage_a", begun / "pictures", output) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"The checkpoint {output / 'stage_a' / 'state'} does not fit this configuration, or is damaged ("
    )
    assert said.endswith("); move it away to start the stage again.")


@pytest.mark.slow
def test_the_seed_decides_the_initial_weights(begun: Path, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        output = shutil.copytree(begun / "run", tmp_path / str(seed))
        torch.manual_seed(100 + seed)  # whatever was drawn before
        config = write_config(tmp_path, CHANGES + f"stage_a.options.seed = {seed // 2}\nstage_a.options.steps = 2")
        assert train(config, "stage_a", begun / "pictures", output) == 0
    first, second, other = (digest(tmp_path / str(seed) / WEIGHTS) for seed in (0, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.slow
def test_a_disk_that_is_full_is_named(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a disk, all that shows is that a file cannot grow: here its limit is the process's."""
    resource = pytest.importorskip("resource")
    output = shutil.copytree(begun / "run", tmp_path / "run")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))
    try:
        assert again(begun, output) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"{output / 'stage_a' / 'state.part'} could not be written: ")
    assert said.endswith(" MB free.")
    assert again(begun, output) == 0
    assert digest(output / WEIGHTS) == digest(begun / "whole" / WEIGHTS)


def test_components_are_replaced_whole(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    (model / "old").mkdir(parents=True)
    (model / "old" / "model.fp16.safetensors").write_text("old")
    (model / "old" / "README").write_text("kept")
    other.mkdir()
    (other / "weights").write_text("another folder's")
    (model / "linked").symlink_to(other)

    def write(folder: Path) -> None:
        for name in ("old", "new", "linked"):
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_text("made")
        assert (model / "old" / "model.fp16.safetensors").exists()

    write_components(model, "stage", write)
    assert sorted(path.name for path in model.iterdir()) == ["linked", "new", "old"]
    assert sorted(path.name for path in (model / "old").iterdir()) == ["README", "model.safetensors"]
    assert sorted(path.name for path in other.iterdir()) == ["weights"]
    with pytest.raises(ZeroDivisionError):
        write_components(model, "stage", lambda folder: 1 / 0)
    assert sorted(path.name for path in model.iterdir()) == ["linked", "new", "old"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    for text in ("one", "two"):
        with whole_file(file) as part:
            part.write_text(text)
        assert file.read_text() == text

    def interrupted() -> None:
        with whole_file(file) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "two"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
