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

from cascade.cascade import Cascade, Request
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.weights import ModelFolder
from training import run
from training.data.icons import STYLES, IconObject, pack_drawings

ROOT = Path(__file__).parent.parent.parent
CONFIG = """
[model]
name = "Test"
license = "none"
prior = { steps = 2, guidance = 4.0, shift = 2.0, rescale = 0.7 }
decoder = { steps = 2, guidance = 1.0, shift = 1.0, rescale = 0.7 }
[data]
size = 128
other_sizes = [[192, 128]]
scenes = 64
unseen = 64
seed = 0
[tokenizer]
vocabulary = 700
[vqgan]
embed_dim = 16
bottleneck_blocks = 1
num_vq_embeddings = 8
scale_factor = 0.43
[text_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
max_position_embeddings = 77
projection_dim = 16
[image_encoder]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
image_size = 32
patch_size = 16
projection_dim = 16
[effnet]
stem_channels = 8
channels = [8, 8, 8, 8, 8, 8]
repeats = [1, 1, 1, 1, 1, 1]
expansions = [1, 2, 2, 2, 2, 2]
strides = [1, 2, 2, 2, 1, 2]
head_channels = 16
[previewer_network]
hidden = 16
[decoder]
in_channels = 4
out_channels = 4
patch_size = 2
conditioning_dim = 16
block_out_channels = [16, 16]
num_attention_heads = [0, 2]
down_num_layers_per_block = [1, 1]
up_num_layers_per_block = [1, 1]
down_blocks_repeat_mappers = [1, 1]
up_blocks_repeat_mappers = [1, 1]
block_types_per_layer = [
    ["SDCascadeResBlock", "SDCascadeTimestepBlock"],
    ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"],
]
clip_text_pooled_in_channels = 16
effnet_in_channels = 16
pixel_mapper_in_channels = 3
timestep_conditioning_type = ["sca"]
[prior]
conditioning_dim = 16
block_out_channels = [16, 16]
num_attention_heads = [2, 2]
down_num_layers_per_block = [1, 1]
up_num_layers_per_block = [1, 1]
clip_text_in_channels = 16
clip_text_pooled_in_channels = 16
clip_image_in_channels = 16
switch_level = [false]
[stage_a]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3, compile = false }
task = { crop = 64, latent_noise = 0.05 }
[clip]
options = { steps = 2, batch_size = 4, learning_rate = 1e-3, compile = false }
[vision]
options = { steps = 2, batch_size = 4, learning_rate = 1e-3, compile = false }
task = { naming = 1.0 }
[semantic]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3, compile = false }
[semantic.task]
weight = { kind = "p2", k = 0.01, floor = 0.1 }
pyramid = 0.75
semantic_noise = 0.1
preview_weight = 1.0
drop_semantic = 0.1
drop_text = 0.1
[stage_b]
options = { steps = 8, batch_size = 3, learning_rate = 1e-3, compile = false }
[stage_b.task]
weight = { kind = "adaptive" }
pyramid = 0.75
semantic_noise = 0.1
drop_semantic = 0.1
drop_text = 0.1
[stage_c]
options = { steps = 8, batch_size = 4, learning_rate = 1e-3, compile = false }
[stage_c.task]
weight = { kind = "p2" }
drop_text = 0.1
keep_image = 0.1
[previewer]
options = { steps = 2, batch_size = 2, learning_rate = 1e-3, compile = false }
task = { semantic_noise = 0.1 }
[controlnet]
proj_blocks = [0, 3]
[controlnet_canny]
options = { steps = 8, batch_size = 2, learning_rate = 1e-3, compile = false }
data = { scenes = 32, unsaid = 0.5 }
[controlnet_canny.task]
weight = { kind = "p2" }
drop_text = 0.1
keep_image = 0.1
offset_noise = 0.0
[controlnet_inpainting]
options = { steps = 8, batch_size = 2, learning_rate = 1e-3, compile = false }
control = { inverted = 0.25 }
[controlnet_inpainting.task]
weight = { kind = "adaptive" }
drop_text = 0.1
keep_image = 0.1
offset_noise = 0.1
"""

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">
<ellipse cx="12" cy="12" rx="{radius}" ry="9" fill="hsl({hue}, 80%, {light}%)"/></svg>"""

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
    (folder / "config.toml").write_text(CONFIG)
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
    """By torchrun, which ``accelerate launch`` uses for GPUs; on CPUs the latter starts one process only."""
    shutil.copytree(trained / "model", tmp_path / "model")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    files = ["--data", trained.parent / "drawings.zip", "--output", tmp_path]
    command = [*launch, "-m", "training.run", trained.parent / "config.toml", "stage_c", *files]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "stage_c" / run.FINISHED).exists()
    # Each process keeps a random state of its own, and the gradients of both are in the one network that is saved.
    assert len(list((tmp_path / "stage_c" / "state").glob("random_states_*.pkl"))) == 2
    one, two = (StableCascadeUNet.from_pretrained(folder / "model" / "prior") for folder in (trained, tmp_path))
    assert all(torch.isfinite(value).all() for value in two.state_dict().values())
    assert not torch.equal(one.clf[1].weight, two.clf[1].weight)
