"""Training where it is meant to run: compiled on one GPU; on two, by accelerate, with clocks that differ."""

import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from tests.training.small import CONFIG, OWN_CLOCK, body, train, write_config, write_pictures
from training import run
from training.options import Options
from training.recipe import Ledger, costs, launcher, train_all
from training.record import Record
from training.stages import STAGES
from training.task import Task
from training.trainer import fit

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


class Rows(Task):
    """Fits a network to the rows of a table in their order. In float64, so that rounding does not matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1)).double()
        self.rows = torch.randn(64, 9, dtype=torch.float64).cuda()

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        x, y = self.rows[index * size : (index + 1) * size].split((8, 1), dim=1)
        return {"x": x.contiguous(), "y": y.contiguous()}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.network(x) - y).square().mean()}

    def evaluate(self) -> tuple[dict[str, float], None]:
        return {}, None

    def save(self, folder: Path) -> None:
        pass


def test_accumulated_micro_batches_make_one_step_of_all_compiled_or_not(tmp_path: Path) -> None:
    """A batch of 8, and 4 micro-batches of 2. Compiled, gradients are in memory of CUDA graphs, see `own_gradients`."""
    torch._dynamo.reset()
    weights = {}
    for compiled in (False, True):
        for accumulate in (1, 4):
            task, folder = Rows(), tmp_path / f"{compiled}-{accumulate}"
            options = Options(
                steps=8,
                batch_size=8 // accumulate,
                accumulate=accumulate,
                learning_rate=1e-2,
                precision="no",
                compile=compiled,
            )
            assert fit(task, options, folder, tmp_path / "model")
            weights[compiled, accumulate] = torch.cat([one.detach().flatten() for one in task.parameters()])
    graphs = torch._inductor.cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert graphs is not None
    assert any(graphs.roots.values())
    begun = torch.cat([one.detach().flatten() for one in Rows().parameters()]).cuda()
    for found in weights.values():
        torch.testing.assert_close(found, weights[False, 1], rtol=0, atol=1e-8)
        assert (found - begun).abs().mean() > 1e-2


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


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["stage_b", "stage_c"])
def test_compiled_gradients_are_those_of_plain_float32(stage: str, processes: int, tmp_path: Path) -> None:
    """Of the miniature's networks, as its recipe trains them, and for sizes that are not compiled.

    bfloat16 alone makes 0.010 (uncompiled, 341 pictures, H100). Attention by cuDNN and donated buffers made 30.
    """
    if torch.cuda.device_count() < processes:
        pytest.skip("needs two CUDA devices")
    tables = tomllib.loads((ROOT / "miniature" / "mini.toml").read_text())
    tables["data"] = {"size": 256, "other_sizes": tables["data"]["other_sizes"], "other_sizes_every": 4}
    tables[stage]["options"] = {"steps": 10, "batch_size": 32 * processes, "gpus": processes, "learning_rate": 1e-3}
    others = set(STAGES) - {stage}
    config = tmp_path / "config.toml"
    kept = {name: table for name, table in tables.items() if name not in others}
    config.write_text("\n".join(f"[{name}]\n{body(table)}" for name, table in kept.items()))
    (tmp_path / "model").symlink_to(ROOT / "weights" / "mini")
    pictures = write_pictures(tmp_path / "pictures", 40)
    command = [sys.executable, "-m", *launcher(processes), "tests.gpu.gradients", config, stage, pictures, tmp_path]
    done = subprocess.run([str(one) for one in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0
    compared = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(one["shape"]) for one in compared}) == 2
    assert max(one["error"] for one in compared) < 0.05, compared
