"""The IP-Adapter learns from references, and nothing else does."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights.variants import VARIANTS
from scripts.save_weights import main as save_weights
from tests.components import make_ip_adapter
from tests.training.small import train, write_config, write_pictures
from training.configuration import read_configuration
from training.dataset import Dataset
from training.errors import TrainingError
from training.options import Options
from training.randomness import step_generator
from training.shapes import Shapes
from training.tasks.ip_adapter import IPAdapterTask, new_ip_adapter
from training.trainer import fit
from training.workshop import load_component

OPTIONS = Options(steps=20, batch_size=8, learning_rate=3e-3, warmup=2, precision="no", compile=False, ema=0.9)
CPU = torch.device("cpu")
# The tiny model has components of other sizes.
OWN = "- decoder\n- controlnet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
COLOURS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.6, 0.1], [0.1, 0.2, 0.9], [0.9, 0.8, 0.1]])


class Colours(Dataset):
    """Pictures of one of four colours each, in a gradient. A caption says nothing; the reference has the picture's colour."""

    def __init__(self, count: int, tokenizer: Any) -> None:
        super().__init__(["a picture"] * count, tokenizer, (128, 128), CPU)

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or self.size
        light = torch.linspace(0.6, 1, height)[:, None].expand(height, width)
        return COLOURS[indices % 4][:, :, None, None] * light

    def references(self, indices: Tensor) -> Tensor:
        return COLOURS[indices % 4][:, :, None, None].expand(-1, -1, *self.size).clone()


@pytest.fixture(scope="module")
def mini() -> dict[str, Any]:
    """The miniature's networks: an adapter can do nothing with a Stage C that knows nothing."""
    folder = Path(__file__).parents[3] / "weights" / "mini"
    names = ("tokenizer", "prior", "effnet", "previewer", "text_encoder", "image_encoder")
    return {name: load_component(folder, name) for name in names}


def mini_adapter(parts: dict[str, Any], **changes: Any) -> IPAdapter:
    torch.manual_seed(0)
    sizes = {"feature_dim": 128, "conditioning_dim": 192, "block_channels": 240, "num_tokens": 4, "hidden_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "blocks": (0, 3, 6)}
    return new_ip_adapter(parts["prior"], parts["image_encoder"], **{**sizes, **layers, **changes})


def make_task(parts: dict[str, Any], dataset: type[Dataset] = Colours, **changes: Any) -> IPAdapterTask:
    parts = copy.deepcopy(parts)
    networks = {name: parts[name] for name in ("prior", "effnet", "previewer", "text_encoder", "image_encoder")}
    arguments = {
        "dataset": dataset(24, parts["tokenizer"]),
        "unseen": dataset(8, parts["tokenizer"]),
        "shapes": Shapes((128, 128), ((192, 128),), every=4),
        "weight": {"kind": "p2", "k": 0.1},
        "drop_text": 0.5,
        **networks,
        **changes,
    }
    return IPAdapterTask(mini_adapter(parts), **arguments)


@pytest.mark.slow
def test_a_new_one_changes_nothing(mini: dict[str, Any]) -> None:
    task = make_task(mini, unseen=Colours(2, mini["tokenizer"]))
    batch = task.batch(0, 4, step_generator(0, 0, 0, CPU))
    with torch.no_grad():
        one, two = (task(**{**batch, "features": batch["features"] * factor})["loss"] for factor in (1, 0))
    assert torch.equal(one, two)
    figures, _ = task.eval().evaluate()
    assert figures["error"] == figures["error_without"]


@pytest.mark.slow
def test_it_learns_and_nothing_else_does(mini: dict[str, Any], tmp_path: Path) -> None:
    task = make_task(mini)
    frozen = {
        name: {key: value.clone() for key, value in network.state_dict().items()}
        for name, network in task.frozen.items()
    }
    before = {key: value.clone() for key, value in task.ip_adapter.state_dict().items()}
    assert fit(task, OPTIONS, tmp_path / "ip_adapter", tmp_path / "model")
    for name, network in task.frozen.items():
        assert all(torch.equal(value, frozen[name][key]) for key, value in network.state_dict().items())
    assert all(not torch.equal(value, before[key]) for key, value in task.ip_adapter.state_dict().items())
    with torch.no_grad():
        figures, sheet = task.eval().evaluate()
    assert figures["error"] < 0.8 * figures["error_without"]
    assert sheet.size == (8 * 128, 2 * 128)
    saved = load_file(tmp_path / "model" / "ip_adapter" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == before.keys()


def test_captions_are_dropped_only_where_the_reference_shows_the_same(mini: dict[str, Any]) -> None:
    class Others(Colours):
        def same_subject(self, indices: Tensor) -> Tensor:
            return indices % 2 == 0

    task = make_task(mini, Others, drop_text=1.0)
    batch = task.batch(0, 16, step_generator(0, 0, 0, CPU))
    empty = task.data.text.pooled[-1, 0].float()
    dropped = (batch["pooled"][:, 0] == empty).all(dim=1)
    indices, _ = task.data.draw(0, 16, step_generator(0, 0, 0, CPU))
    assert torch.equal(dropped, indices % 2 == 0)
    assert 0 < dropped.sum() < 16


def test_references_go_with_their_pictures(mini: dict[str, Any]) -> None:
    task = make_task(mini)
    for step in (0, 3):  # of either size
        batch = task.batch(step, 8, step_generator(0, step, 0, CPU))
        indices, (latents,) = task.data.draw(step, 8, step_generator(0, step, 0, CPU))
        expected = task.references.encode(task.dataset.references(indices)).float()
        torch.testing.assert_close(batch["features"], expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(batch["latents"], latents)


def test_the_reference_of_any_picture_is_a_part_of_it(mini: dict[str, Any]) -> None:
    class Columns(Colours):
        """Brighter from left to right."""

        references = Dataset.references

        def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
            height, width = size or self.size
            return torch.linspace(0, 1, width).expand(len(indices), 3, height, width).clone()

    dataset = Columns(40, mini["tokenizer"])
    indices = torch.arange(40)
    seen = dataset.references(indices)
    assert seen.shape == (40, 3, 128, 128)
    assert torch.equal(seen, dataset.references(indices))
    span = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]).tolist()
    assert 8 < sum(one < 0 for one in span) < 32
    assert all(0.55 < abs(one) <= 1 for one in span)
    assert len({round(one, 3) for one in span}) > 20


def test_an_adapter_of_another_stage_c(mini: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"attention block 8 of Stage C, which has 8, from 0\."):
        mini_adapter(mini, blocks=(0, 8))
    with pytest.raises(TrainingError, match=r"reads hidden states of width 16; the image encoder's have 128\."):
        IPAdapterTask(make_ip_adapter(), **{**vars_of(make_task(mini)), "unseen": None})


def vars_of(task: IPAdapterTask) -> dict[str, Any]:
    frozen = task.frozen
    return {
        "prior": frozen["prior"],
        "effnet": frozen["effnet"],
        "previewer": frozen["previewer"],
        "text_encoder": frozen["text"],
        "image_encoder": task.references.image_encoder,
        "dataset": task.dataset,
        "shapes": task.data.shapes,
        "weight": {"kind": "p2"},
        "drop_text": 0.5,
    }


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_model_that_uses_it(model_folder: Path, tmp_path: Path) -> None:
    """By the command line; stopped and resumed, with the same result; then it is trained further."""
    pictures = write_pictures(tmp_path / "pictures", 6)
    changes = "ip_adapter.options = { steps = 3, batch_size = 2, learning_rate = 1e-2, warmup = 1, seed = 5 }"
    config = write_config(tmp_path, f"{OWN}\n{changes}")
    parts = ("tokenizer", "text_encoder", "image_encoder", "prior", "effnet", "previewer")
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        for part in parts:
            shutil.copytree(model_folder / part, output / "model" / part)
    assert train(config, "ip_adapter", pictures, outputs[0]) == 0
    assert train(config, "ip_adapter", pictures, outputs[1], "--minutes", "0") == 0
    assert not (outputs[1] / "ip_adapter" / "finished").exists()
    assert train(config, "ip_adapter", pictures, outputs[1]) == 0
    one, two = (load_file(output / "model" / "ip_adapter" / WEIGHTS) for output in outputs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["ip_adapter.0.to_v_ip.weight"].any()
    for output in outputs:
        assert (output / "ip_adapter" / "finished").exists()

    folder = tmp_path / "weights"
    more = ["--base", model_folder, "--output", folder, "--download", tmp_path / "none"]
    assert save_weights(["--ip-adapter", str(outputs[0] / "model" / "ip_adapter"), *map(str, more)]) == 0
    cascade = Cascade.load(folder, device="cpu")
    request = Request("a cat", width=64, height=64, steps_prior=2, steps_decoder=1)
    image = Image.open(pictures / "00.png")
    (plain,), (shown,) = cascade.generate(request), cascade.generate(replace(request, ip_adapter_images=(image,)))
    assert plain.tobytes() != shown.tobytes()

    shutil.rmtree(outputs[0] / "ip_adapter")
    assert train(config, "ip_adapter", pictures, outputs[0], "--steps", "1") == 0
    further = load_file(outputs[0] / "model" / "ip_adapter" / WEIGHTS)
    key = "ip_adapter.0.to_k_ip.weight"
    assert 0 < (further[key].float() - one[key].float()).abs().max() < 0.1
    assert further["ip_adapter.0.to_v_ip.weight"].any()


def test_the_recipe_for_the_published_model_fits_it() -> None:
    config = read_configuration(Path(__file__).parents[3] / "training" / "ip_adapter.toml")
    prior = next(variant.config for variant in VARIANTS if variant.name == "prior")
    with torch.device("meta"):
        adapter = IPAdapter(**config["ip_adapter_network"])
        assert adapter.misfit(StableCascadeUNet(**prior), 1024) is None
        shapes, expected = (
            {key: value.shape for key, value in one.state_dict().items()} for one in (adapter, IPAdapter())
        )
    assert shapes == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("ip_adapter_network.feature_dim = 24", "feature_dim is 24"),
        ("ip_adapter_network.conditioning_dim = 8", "conditioning_dim is 8"),
        ("ip_adapter_network.blocks = [0, 9]", " has 4 attention blocks, from 0 to 3."),
        ("ip_adapter_network.style_blocks = [1]", "style_blocks is (1,); each must be one of blocks, (0, 3)"),
        ("ip_adapter.task.drop_text = 1.5", "drop_text is 1.5; it must be from 0 to 1."),
        ("- ip_adapter_network", "The configuration has no table [ip_adapter_network], which ip_adapter needs."),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(
    model_folder: Path, tmp_path: Path, changes: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "pictures", 6)
    config = write_config(tmp_path, f"{OWN}\n{changes}")
    for part in ("tokenizer", "text_encoder", "image_encoder", "prior", "effnet", "previewer"):
        shutil.copytree(model_folder / part, tmp_path / "out" / "model" / part)
    assert train(config, "ip_adapter", pictures, tmp_path / "out") == 1
    (sentence,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert said in sentence
    assert not (tmp_path / "out" / "model" / "ip_adapter").exists()
