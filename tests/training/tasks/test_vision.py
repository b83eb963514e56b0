"""The vision tower learns what is on pictures, by names, and nothing else learns."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from training.dataset import Dataset
from training.options import Options
from training.randomness import step_generator
from training.tasks.vision import VisionTask
from training.trainer import fit
from training.workshop import load_component

CPU = torch.device("cpu")
COLOURS = {
    name: torch.tensor(value, dtype=torch.float32)
    for name, value in {
        "black": (0, 0, 0),
        "red": (1, 0, 0),
        "green": (0, 1, 0),
        "blue": (0, 0, 1),
        "yellow": (1, 1, 0),
        "purple": (1, 0, 1),
        "turquoise": (0, 1, 1),
        "white": (1, 1, 1),
        "gray": (0.5, 0.5, 0.5),
        "orange": (1, 0.5, 0),
    }.items()
}
OPTIONS = Options(steps=25, batch_size=16, learning_rate=1e-2, warmup=5, precision="no", compile=False, ema=0.5)


class Colours(Dataset):
    """Pictures of one colour, of which the caption does not say which; some are two of them, side by side."""

    def __init__(self, count: int, tokenizer: Any, names: tuple[str, ...] = tuple(COLOURS)) -> None:
        super().__init__(["a picture"] * count, tokenizer, (64, 64), CPU, names)

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or self.size
        pixels = torch.zeros(len(indices), 3, height, width)
        for picture, (left, right) in zip(pixels, self.colours(indices), strict=True):
            picture[:, :, : width // 2] = COLOURS[left].view(3, 1, 1)
            picture[:, :, width // 2 :] = COLOURS[right].view(3, 1, 1)
        return pixels

    def shown(self, indices: Tensor) -> Tensor:
        return torch.tensor([[name in pair for name in self.names] for pair in self.colours(indices)])

    def colours(self, indices: Tensor) -> list[tuple[str, str]]:
        names = list(COLOURS)
        return [(names[i % 10], names[i // 10 % 10] if i % 3 == 0 else names[i % 10]) for i in indices.tolist()]


class Saying(torch.nn.Module):
    """A vision tower that says the same of whatever it sees."""

    def __init__(self, image_embeds: Tensor) -> None:
        super().__init__()
        self.image_embeds = image_embeds

    def forward(self, pixel_values: Tensor) -> "Saying":
        return self


@pytest.fixture(scope="module")
def mini() -> dict[str, Any]:
    folder = Path(__file__).parents[3] / "weights" / "mini"
    return {name: load_component(folder, name) for name in ("tokenizer", "text_encoder", "image_encoder")}


def make_task(parts: dict[str, Any], naming: float = 1.0, names: tuple[str, ...] = tuple(COLOURS)) -> VisionTask:
    torch.manual_seed(0)
    datasets = {key: Colours(100, parts["tokenizer"], names) for key in ("dataset", "unseen")}
    image_encoder = CLIPVisionModelWithProjection(copy.deepcopy(parts["image_encoder"].config))
    return VisionTask(image_encoder, text_encoder=parts["text_encoder"], naming=naming, **datasets)


@pytest.mark.slow
def test_it_learns_what_captions_do_not_say(mini: dict[str, Any], tmp_path: Path) -> None:
    task = make_task(mini)
    text = {name: value.clone() for name, value in mini["text_encoder"].state_dict().items()}
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert all(name.startswith("image_encoder.") or name == "log_temperatures" for name in trained)
    with torch.no_grad():
        before, sheet = task.evaluate()
    assert before["named_in_5"] < 0.8
    assert min(sheet.size) >= 64
    fit(task, OPTIONS, tmp_path / "vision", tmp_path / "model")
    with torch.no_grad():
        after, _ = task.evaluate()
    assert after["named_in_5"] > 0.95
    assert all(torch.equal(value, text[name]) for name, value in mini["text_encoder"].state_dict().items())
    saved = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "model" / "image_encoder")
    assert saved.config.projection_dim == mini["image_encoder"].config.projection_dim


def test_a_picture_of_two_things_is_named_by_both(mini: dict[str, Any]) -> None:
    """The loss is least where both names are as near as each other, and nearer than all others."""
    task = make_task(mini)
    batch = task.batch(0, 16, step_generator(0, 0, 0, CPU))
    assert batch["shown"].sum(dim=1).unique().tolist() == [1, 2]
    two = batch["shown"].sum(dim=1) == 2
    exact = {name: value[two] for name, value in batch.items()}
    wanted = torch.nn.functional.normalize(exact["shown"] @ task.names, dim=-1)
    other = torch.nn.functional.normalize(exact["shown"].roll(1, dims=1) @ task.names, dim=-1)

    def loss(image: Tensor) -> float:
        task.image_encoder = Saying(image)
        return task(**exact)["named"].item()

    assert loss(wanted) < loss(other)


def test_without_names_there_are_captions(mini: dict[str, Any]) -> None:
    task = make_task(mini, naming=0.0, names=())
    outputs = task(**task.batch(0, 4, step_generator(0, 0, 0, CPU)))
    assert outputs["loss"] == outputs["contrast"]
    assert task.evaluate()[0] == {}
    with pytest.raises(ValueError, match=r"naming is 1\.0, but the data have no names"):
        make_task(mini, names=())
