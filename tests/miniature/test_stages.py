"""The miniature's recipe at the smallest size that still runs the real code: from drawings to a model folder."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import tomllib
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import scripts.train_mini
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights import ModelFolder
from miniature import dataset
from tests.miniature.small import DRAWN, pack
from tests.training.nursery import Nursery
from tests.training.small import OTHER_CLOCK, train, write_config
from training import run, statistics
from training.recipe import Ledger, copy_stage, costs, costs_table, train_all
from training.record import Record
from training.stages import waits_for

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.slow

NETWORKS = {
    "vqgan": StageA,
    "effnet": SemanticEncoder,
    "previewer": Previewer,
    "decoder": StableCascadeUNet,
    "prior": StableCascadeUNet,
    "controlnet_canny": ControlNet,
    "controlnet_inpainting": ControlNet,
    "ip_adapter": IPAdapter,
}


# The stages that a process of their own trains.
ALONE = ("previewer", "controlnet_canny", "ip_adapter")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """A folder with drawings and a configuration; in ``run``, all stages; in ``kept``, what they made; in ``said``, what
    ``scripts/train-mini`` said.

    It trains the last stages, two at once; this process those before them.
    """
    folder = tmp_path_factory.mktemp("training")
    data = pack(("apple", "pear", "plum", "fig", "lime", "melon"), folder / "drawings.zip")
    config, output, kept = write_config(folder, DRAWN), folder / "run", folder / "kept"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BATCHES", 4)  # 40 take as long as all of the training
        patch.setattr(dataset, "CAPTIONS_FOR_TOKENIZER", 2000)  # as do 100 000
        for stage in run.ORDER:
            if stage not in ALONE:
                assert train(config, stage, data, output) == 0
                copy_stage(output, stage, kept)
        patch.setattr(sys, "executable", str(nursery.python))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert train_mini(folder, output, "--at-once", "2", "--copy-to", str(kept)) == 0
    (folder / "said").write_text(said.getvalue())
    return folder


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """The output folder of all stages, a few steps each."""
    return recipe / "run"


def train_mini(recipe: Path, output: Path, *options: str) -> int:
    """``scripts/train-mini`` in this process; returns the exit code."""
    files = ["--config", recipe / "config.toml", "--data", recipe / "drawings.zip", "--output", output]
    return scripts.train_mini.main([*map(str, files), *options])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_component_is_written_and_finite(trained: Path, name: str) -> None:
    network = NETWORKS[name].from_pretrained(trained / "model" / name)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("stage", run.STAGES)
def test_every_stage_leaves_a_checkpoint_a_picture_and_a_log(trained: Path, stage: str) -> None:
    assert (trained / stage / "state").is_dir()
    (file,) = (trained / stage / "samples").iterdir()
    with Image.open(file) as sheet:
        assert min(sheet.size) >= 2 * 24  # two rows of previews, 3/16 of 128 pixels each
    assert list((trained / stage / "logs").rglob("events.out.tfevents.*"))


def test_stage_a_latents_have_the_scale_that_diffusion_expects(trained: Path) -> None:
    """Whatever the weights, batch normalisation leaves the training latents at unit deviation after the scale factor."""
    network = StageA.from_pretrained(trained / "model" / "vqgan")
    affine = network.down_blocks[-1][1]
    assert affine.weight.tolist() == [torch.tensor(network.config.scale_factor).bfloat16().item()] * 4
    network.train()
    latents = network.encode(torch.rand(4, 3, 64, 64))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert math.isclose(latents.mean().item(), 0, abs_tol=0.05)


def test_a_model_folder_is_made_of_them(trained: Path) -> None:
    ModelFolder.open(trained / "weights").verify()
    cascade = Cascade.load(trained / "weights", device="cpu")
    request = Request(prompt="an apple", width=128, height=192, steps_prior=1, steps_decoder=1)
    ((image,), (turbo,)) = (cascade.generate(replace(request, speed=speed)) for speed in ("exact", "turbo"))
    assert image.size == turbo.size == (128, 192)
    assert image != turbo


def test_steps_and_times_are_beside_the_weights(trained: Path) -> None:
    made = json.loads((trained / "weights" / "training.json").read_text())
    assert tuple(made["stages"]) == tuple(run.STAGES)
    tables = tomllib.loads((trained.parent / "config.toml").read_text())
    for name in run.STAGES:
        stage = made["stages"][name]
        assert stage["steps"] == tables[name]["options"]["steps"]
        assert stage["samples_per_step"] == tables[name]["options"]["batch_size"]
        assert (stage["sessions"], stage["devices"]) == (1, ["cpu"])
        assert 0 < sum(stage["seconds"].values()) < (stage["process_seconds"] if name in ALONE else math.inf)
    assert made["process_seconds"] == pytest.approx(sum(one["process_seconds"] for one in made["stages"].values()))
    assert made["seconds"] < made["process_seconds"]  # two at once
    table = costs_table(made).splitlines()
    assert table[2].startswith("| stage_a | 2 | 2 | ")
    assert table[-1].endswith(" minutes in 1 call.")


def test_no_stage_starts_before_those_it_waits_for(recipe: Path, trained: Path) -> None:
    """And some run at the same time."""
    processes = json.loads((trained / "recipe.json").read_text())["processes"]
    assert sorted(one["stage"] for one in processes) == sorted(ALONE)
    starts = {one["stage"]: datetime.fromisoformat(one["started"]).timestamp() for one in processes}  # whole seconds
    ends = {one["stage"]: starts[one["stage"]] + one["seconds"] for one in processes}
    said = [re.findall(r"\w+", line)[:2] for line in (recipe / "said").read_text().splitlines()]
    started, finished = ({stage: said.index([stage, word]) for stage in ALONE} for word in ("started", "finished"))
    waits = [(stage, before) for stage in ALONE for before in waits_for(stage) if before in ALONE]
    assert waits
    for stage, before in waits:
        assert starts[stage] >= ends[before] - 1
        assert started[stage] > finished[before]
    pairs = itertools.combinations(ALONE, 2)
    assert any(max(started[one], started[other]) < min(finished[one], finished[other]) for one, other in pairs)


def test_what_is_kept_is_enough_to_go_on_elsewhere(
    recipe: Path,
    trained: Path,
    tmp_path: Path,
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", str(nursery.python))
    kept = shutil.copytree(recipe / "kept", tmp_path / "kept")
    assert not list(kept.rglob("state"))
    shutil.rmtree(kept / "previewer")
    assert train_mini(recipe, kept, "--minutes", "0") == 0
    assert capsys.readouterr().out == "The time is up; left: previewer. Call again to go on.\n"
    assert not (kept / "weights").exists()
    assert train_mini(recipe, kept) == 0
    assert capsys.readouterr().out.endswith(f"{kept / 'weights'}\n")
    for component in ("prior", "decoder", "vqgan"):
        one, other = (load_file(path / "weights" / component / WEIGHTS) for path in (trained, kept))
        assert all(torch.equal(one[name], other[name]) for name in one)
    made = json.loads((kept / "weights" / "training.json").read_text())
    assert len(made["calls"]) == 3
    assert made["stages"]["stage_c"]["steps"] == 8


def test_a_stage_that_fails_ends_the_call(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its last line is said, where its output is in a file because several run at once. The process is Python's own here."""
    kept = shutil.copytree(recipe / "kept", tmp_path / "kept")
    shutil.rmtree(kept / "previewer")
    shutil.rmtree(kept / "model" / "effnet")
    assert train_mini(recipe, kept, "--at-once", "2") == 1
    assert "previewer: previewer needs effnet, which " in capfd.readouterr().out
    assert not (kept / "weights").exists()


def test_a_signal_is_passed_on_to_stages_which_save(
    recipe: Path,
    tmp_path: Path,
    nursery: Nursery,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And what the call cost is known, that of the tokenizer too, which has no record."""
    monkeypatch.setattr(sys, "executable", str(nursery.python))
    tables = ("model", "data", "tokenizer", "vqgan", "stage_a")
    others = [f"- {name}" for name in tomllib.loads((recipe / "config.toml").read_text()) if name not in tables]
    lasting = "stage_a.options = { steps = 100000, batch_size = 2, learning_rate = 1e-3, evaluate_every = 2 }"
    write_config(tmp_path, "\n".join([DRAWN, lasting, *others]))
    shutil.copy(recipe / "drawings.zip", tmp_path)
    output, ended = tmp_path / "run", threading.Event()

    def send() -> None:
        while not list((output / "stage_a").glob("samples/*.png")):
            if ended.wait(0.1):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    code = train_mini(tmp_path, output)
    ended.set()
    sender.join()
    assert code == 128 + signal.SIGTERM
    assert "stage_a: stopped and saved at step " in capfd.readouterr().err
    made = costs(output)
    assert list(made["stages"]) == ["tokenizer", "stage_a"]
    assert 0 < made["stages"]["tokenizer"]["process_seconds"] < made["process_seconds"] < made["seconds"]
    assert costs_table(made).splitlines()[2].startswith("| tokenizer |  |  | ")
    assert (tmp_path / "run" / "stage_a" / "state").is_dir()
    assert Record.load(tmp_path / "run" / "stage_a").steps > 0


def test_a_component_of_a_finished_stage_is_stored_as_it_ships(trained: Path) -> None:
    for component in NETWORKS:
        files = [trained / folder / component / WEIGHTS for folder in ("model", "weights")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_several_processes_divide_a_batch(
    tmp_path: Path, trained: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the stage's GPUs, by torchrun, which ``accelerate launch`` uses for GPUs; here, they compute on the CPU."""
    earlier = ("tokenizer", "stage_a", "clip", "semantic")
    tables = tomllib.loads((trained.parent / "config.toml").read_text())
    others = [f"- {stage}" for stage in run.STAGES if stage in tables and stage not in (*earlier, "stage_c")]
    options = "steps = 24, batch_size = 8, learning_rate = 1e-3, accumulate = 2, checkpoint_seconds = 0.5, gpus = 2"
    config = write_config(tmp_path, DRAWN + "\n".join([*others, f"stage_c.options = {{ {options} }}"]))
    output = tmp_path / "run"
    for stage in earlier:
        copy_stage(trained, stage, output)
    # Read by every Python that starts.
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sitecustomize.py").write_text(OTHER_CLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "first"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    monkeypatch.setattr(sys, "executable", str(nursery.python))
    assert train_all(config, trained.parent / "drawings.zip", output) == 0
    assert (output / "stage_c" / run.FINISHED).exists()
    # Each process keeps a random state of its own, and the gradients of both are in the one network that is saved.
    assert len(list((output / "stage_c" / "state").glob("random_states_*.pkl"))) == 2
    one, two = (StableCascadeUNet.from_pretrained(folder / "model" / "prior") for folder in (trained, output))
    assert all(torch.isfinite(value).all() for value in two.state_dict().values())
    assert not torch.equal(one.clf[1].weight, two.clf[1].weight)
    assert Record.load(output / "stage_c").sessions[0].processes == 2
    (process,) = Ledger.load(output).processes
    assert process["gpus"] == ["4", "7"]
    made = costs(output)["stages"]["stage_c"]
    assert made["samples_per_step"] == 16
    assert made["process_seconds"] == 2 * process["seconds"]
