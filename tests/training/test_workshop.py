"""Components as training reads them from a model folder, and as it makes a new one of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.weights import DISTILLED, ModelFolder
from cascade.weights.settings import PUBLISHED_STAGE_A_SCALE
from scripts import save_weights
from tests.conftest import MINI
from tests.training.small import write_config
from training.assemble import assemble
from training.configuration import read_configuration
from training.errors import TrainingError
from training.workshop import Workshop, load_component


@pytest.fixture
def scaled(model_folder: Path, tmp_path: Path) -> Path:
    """A model folder whose Stage A has another scale than its configuration says, as the published one has."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**content, "stage_a_scale": 0.5}))
    return folder


def test_stage_a_has_the_scale_of_the_model_folder(scaled: Path, model_folder: Path) -> None:
    """Otherwise Stage B would learn from latents that Stage A decodes to pictures of another contrast."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mine, plain = (load_component(folder, "vqgan").eval() for folder in (scaled, model_folder))
    assert torch.equal(mine.encode(pixels), plain.encode(pixels, scale=0.5))
    assert not torch.equal(mine.encode(pixels), plain.encode(pixels))


def test_a_new_model_folder_keeps_the_scale(scaled: Path, tmp_path: Path) -> None:
    assemble(read_configuration(write_config(tmp_path)), scaled, tmp_path / "made")
    made = ModelFolder.open(tmp_path / "made")
    configured = made.load_component("vqgan").config.scale_factor
    assert (configured if made.stage_a_scale is None else made.stage_a_scale) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, 0.5])
def test_a_new_stage_a_has_the_scale_that_it_is_decoded_with(tmp_path: Path, own: float | None) -> None:
    """Also if the configuration leaves out its scale and width, and scripts/save-weights makes the model folder.

    That script takes the class's defaults for the published configuration, which has another scale than the weights.
    """
    table = "[vqgan]\n" + ("" if own is None else f"scale_factor = {own}\n")
    config = tmp_path / "config.toml"
    config.write_text(re.sub(r"\[vqgan\]\n.*?(?=\[)", table, write_config(tmp_path).read_text(), flags=re.DOTALL))
    shop = Workshop(read_configuration(config), tmp_path, tmp_path / "run", torch.device("cpu"))
    made = shop.network("vqgan").eval()
    made.save_pretrained(tmp_path / "vqgan")
    files = ["--vqgan", tmp_path / "vqgan", "--base", MINI, "--output", tmp_path / "weights"]
    assert save_weights.main([*map(str, files)]) == 0
    folder = ModelFolder.open(tmp_path / "weights")
    decoded = (
        folder.load_component("vqgan").config.scale_factor if folder.stage_a_scale is None else folder.stage_a_scale
    )
    assert decoded == made.config.scale_factor == (own or PUBLISHED_STAGE_A_SCALE)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        *(f'{{"stage_a_scale": {scale}}}' for scale in ('"large"', '"0.5"', "[1]", "true", "0", "-1", "NaN", "1e999")),
    ],
)
def test_a_damaged_scale(scaled: Path, content: str) -> None:
    (scaled / "model.json").write_text(content)
    with pytest.raises(TrainingError, match=r"^\S+model\.json cannot be read"):
        load_component(scaled, "vqgan")


def test_an_adapter_for_few_steps_is_kept_while_it_fits(model_folder: Path, tmp_path: Path) -> None:
    """As after training a ControlNet in a copy of a model folder; not after training Stage C."""
    trained, config = shutil.copytree(model_folder, tmp_path / "model"), read_configuration(write_config(tmp_path))
    (trained / DISTILLED).parent.mkdir()
    save_file({"prior.x.lora_A.weight": torch.zeros(1, 1)}, trained / DISTILLED)
    (file,) = (trained / "controlnet_canny").glob("*.safetensors")
    add_one(file)
    assemble(config, trained, tmp_path / "made")
    assert ModelFolder.open(tmp_path / "made").distilled().read_bytes() == (trained / DISTILLED).read_bytes()
    (file,) = (trained / "prior").glob("*.safetensors")
    add_one(file)
    assemble(config, trained, tmp_path / "again")
    assert ModelFolder.open(tmp_path / "again").distilled() is None


def add_one(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: one + 1 if one.is_floating_point() else one for name, one in tensors.items()}, file)
