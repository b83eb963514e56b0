"""Every stage of training, in order, at the smallest size that still runs the real code: from drawings to a model folder."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights import ModelFolder
from miniature.icons import STYLES, IconObject, pack_drawings
from tests.miniature.small import DRAWN
from tests.training.small import OWN_CLOCK, write_config
from training import run

ROOT = Path(__file__).parent.parent.parent
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">
<ellipse cx="12" cy="12" rx="{radius}" ry="9" fill="hsl({hue}, 80%, {light}%)"/></svg>"""

pytestmark = pytest.mark.slow

NETWORKS = {
    "vqgan": StageA,
    "effnet": SemanticEncoder,
    "previewer": Previewer,
    "decoder": StableCascadeUNet,
    "prior": StableCascadeUNet,
    "controlnet_canny": ControlNet,
    "controlnet_inpainting": ControlNet,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of all stages, two steps each."""
    folder = tmp_path_factory.mktemp("training")
    names = ("apple", "pear", "plum", "fig", "lime", "melon")
    sets = [
        {name: SVG.format(radius=4 + index, hue=60 * index, light=30 + 20 * style) for index, name in enumerate(names)}
        for style in range(len(STYLES))
    ]
    objects = [IconObject(name, (name,) * len(STYLES)) for name in names]
    pack_drawings(objects, sets, folder / "drawings.zip")
    write_config(folder, DRAWN)
    for stage in run.ORDER:
        run.main(
            [
                str(folder / "config.toml"),
                stage,
                "--data",
                str(folder / "drawings.zip"),
                "--output",
                str(folder / "run"),
            ]
        )
    return folder / "run"


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
    assert affine.weight.tolist() == pytest.approx([network.config.scale_factor] * 4)
    network.train()
    latents = network.encode(torch.rand(4, 3, 64, 64))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert math.isclose(latents.mean().item(), 0, abs_tol=0.05)


def train_mini(trained: Path, *options: str) -> str:
    """What ``scripts/train-mini`` says."""
    files = ["--config", trained.parent / "config.toml", "--data", trained.parent / "drawings.zip", "--output", trained]
    command = [sys.executable, ROOT / "scripts" / "train-mini", *files, *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_script_goes_on_where_it_was_and_writes_a_model_folder(trained: Path) -> None:
    shutil.rmtree(trained / "previewer")
    assert train_mini(trained, "--minutes", "0") == "The time is up in previewer; call again to go on.\n"
    assert not (trained / "weights").exists()
    assert train_mini(trained) == f"{trained / 'weights'}\n"
    ModelFolder.open(trained / "weights").verify()
    request = Request(prompt="an apple", width=128, height=192, steps_prior=1, steps_decoder=1)
    (image,) = Cascade.load(trained / "weights", device="cpu").generate(request)
    assert image.size == (128, 192)


def test_several_processes_train_together(trained: Path, tmp_path: Path) -> None:
    """By torchrun, which ``accelerate launch`` uses for GPUs."""
    shutil.copytree(trained / "model", tmp_path / "model", ignore=shutil.ignore_patterns("prior"))
    (tmp_path / "own_clock.py").write_text(OWN_CLOCK)
    config = write_config(
        tmp_path,
        DRAWN + "stage_c.options = { steps = 24, batch_size = 4, learning_rate = 1e-3, accumulate = 2 }\n"
        "stage_c.options.checkpoint_seconds = 0.5",
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    files = ["--data", trained.parent / "drawings.zip", "--output", tmp_path]
    subprocess.run(
        [*launch, tmp_path / "own_clock.py", config, "stage_c", *files],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=1200,
    )
    assert (tmp_path / "stage_c" / run.FINISHED).exists()
    # Each process keeps a random state of its own, and the gradients of both are in the one network that is saved.
    assert len(list((tmp_path / "stage_c" / "state").glob("random_states_*.pkl"))) == 2
    one, two = (StableCascadeUNet.from_pretrained(folder / "model" / "prior") for folder in (trained, tmp_path))
    assert all(torch.isfinite(value).all() for value in two.state_dict().values())
    assert not torch.equal(one.clf[1].weight, two.clf[1].weight)


def test_accelerate_says_that_it_starts_one_process_without_gpus(trained: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "-m", "training.run"]
    files = ["--data", trained.parent / "drawings.zip", "--output", tmp_path]
    command = [*launch, trained.parent / "config.toml", "tokenizer", *files]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stderr
    assert said.count("One process trains: without GPUs, accelerate launch starts no more.") == 1
