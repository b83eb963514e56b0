"""Training where it is meant to run: compiled on one GPU; on two, by accelerate, with clocks that differ."""

import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from tests.training.small import CONFIG, OWN_CLOCK, train, write_config, write_pictures
from training import run
from training.recipe import Ledger, costs, train_all
from training.record import Record
from training.stages import STAGES

ROOT = Path(__file__).parent.parent.parent


def finite(network: torch.nn.Module) -> bool:
    return all(torch.isfinite(value).all() for value in network.state_dict().values() if value.is_floating_point())


def test_stage_a_is_compiled_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 40), tmp_path / "run"
    config = write_config(tmp_path, "stage_a.options.steps = 12\nstage_a.options.evaluate_every = 5")
    assert train(config, "tokenizer", pictures, output) == 0
    with caplog.at_level(logging.INFO):
        assert train(config, "stage_a", pictures, output, "--minutes", "0") == 0
        assert not (output / "stage_a" / run.FINISHED).exists()
        assert train(config, "stage_a", pictures, output) == 0
    assert "not compiled" not in caplog.text
    assert "stage_a: resumed at step 0" in caplog.text
    assert (output / "stage_a" / run.FINISHED).exists()
    assert finite(StageA.from_pretrained(output / "model" / "vqgan"))


def test_stage_b_is_compiled_once_for_all_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Semantic latents of other scales have the shape of the usual ones."""
    pictures, output = write_pictures(tmp_path / "pictures", 40), tmp_path / "run"
    compiled = "stage_b.options = { steps = 40, batch_size = 4, learning_rate = 1e-3 }\nstage_b.task.other_scales = 0.9"
    earlier = ("stage_a", "clip", "semantic")
    plain = "\n".join(f"{stage}.options.compile = false" for stage in earlier)
    config = write_config(tmp_path, f"{compiled}\n{plain}")
    for stage in ("tokenizer", *earlier):
        assert train(config, stage, pictures, output) == 0
    torch._dynamo.reset()  # what other tests of this process have compiled would count
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    assert train(config, "stage_b", pictures, output) == 0
    assert Record.load(output / "stage_b").sessions[0].device == torch.cuda.get_device_name()
    assert finite(StableCascadeUNet.from_pretrained(output / "model" / "decoder"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_stages_run_at_once_each_on_a_gpu_of_its_own(tmp_path: Path) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 40), tmp_path / "run"
    tables = tomllib.loads(CONFIG)
    plain = [f"{stage}.options.compile = false" for stage in STAGES]
    kept = ("model", "data", "tokenizer", "vqgan", "text_encoder", "image_encoder", "stage_a", "clip")
    changes = [*plain, *(f"- {name}" for name in tables if name not in kept)]
    assert train_all(write_config(tmp_path, "\n".join(changes)), pictures, output, at_once=2) == 0
    gpus = {gpu for one in Ledger.load(output).processes if one["stage"] in ("stage_a", "clip") for gpu in one["gpus"]}
    assert len(gpus) == 2
    assert costs(output)["stages"]["clip"]["devices"] == [torch.cuda.get_device_name()]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_save_and_stop_together(tmp_path: Path) -> None:
    pictures, output = write_pictures(tmp_path / "pictures", 40), tmp_path / "run"
    options = (
        "steps = 200, batch_size = 4, learning_rate = 1e-3, accumulate = 2, checkpoint_seconds = 1.0, compile = false"
    )
    config = write_config(tmp_path, f"vision.task.naming = 0.0\nstage_c.options = {{ {options} }}")
    for stage in ("tokenizer", "stage_a", "clip", "semantic"):
        assert train(config, stage, pictures, output) == 0
    (tmp_path / "own_clock.py").write_text(OWN_CLOCK)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    files = ["--data", pictures, "--output", output]
    subprocess.run(
        [*launch, tmp_path / "own_clock.py", config, "stage_c", *files],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        timeout=600,
    )
    assert (output / "stage_c" / run.FINISHED).exists()
    assert len(list((output / "stage_c" / "state").glob("random_states_*.pkl"))) == 2
    assert finite(StableCascadeUNet.from_pretrained(output / "model" / "prior"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_compiled(tmp_path: Path) -> None:
    """As scripts/train-mini starts a stage with ``gpus = 2``: one graph for the usual size, none for others; resumed."""
    pictures, output = write_pictures(tmp_path / "pictures", 40), tmp_path / "run"
    earlier = ("stage_a", "clip", "semantic")
    kept = ("model", "data", "tokenizer", "vqgan", "text_encoder", "image_encoder", "effnet", "previewer_network")
    kept += ("decoder", "prior", *earlier, "stage_c")
    changes = [f"- {name}" for name in tomllib.loads(CONFIG) if name not in kept]
    changes += [f"{stage}.options.compile = false" for stage in earlier]
    changes += ["stage_c.options = { steps = 48, batch_size = 8, gpus = 2, learning_rate = 1e-3, evaluate_every = 20 }"]
    config = write_config(tmp_path, "\n".join([*changes, "data.other_sizes_every = 8"]))
    assert train_all(config, pictures, output) == 0
    record = Record.load(output / "stage_c")
    assert (record.steps, record.sessions[0].processes) == (48, 2)
    assert finite(StableCascadeUNet.from_pretrained(output / "model" / "prior"))
    (output / "stage_c" / run.FINISHED).unlink()
    assert train_all(config, pictures, output) == 0
    assert Record.load(output / "stage_c").sessions[1].first == 48
