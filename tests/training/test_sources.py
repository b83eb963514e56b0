"""Data of one's own: a class that the configuration names."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade.networks.stage_a import StageA
from tests.training.small import train, write_config, write_pictures
from training.dataset import Dataset
from training.values import Count, Share

ROOT = Path(__file__).parent.parent.parent


class Greys(Dataset):
    """Grey pictures."""

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return (indices / len(self)).view(-1, 1, 1, 1).expand(-1, 3, *(size or self.size)).to(self.device)


class Shades:
    """As many greys as a file says."""

    def __init__(self, path: Path, *, every: Count, share: Share = 1.0) -> None:
        self.path, self.every = path, every

    def check(self, record: Path) -> None:
        pass

    def captions(self) -> list[str]:
        return [f"grey {index}" for index in range(0, int(self.path.read_text()), self.every)]

    def dataset(self, split: str, tokenizer: object, **options: object) -> Dataset:
        return Greys(self.captions(), tokenizer, options["size"], options["device"])


SOURCE = f'data.source = "{__name__}:Shades"'


def test_a_source_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "shades").write_text("20")
    config = write_config(tmp_path, f"{SOURCE}\ndata.every = 2\nstage_a.data = {{ every = 5 }}")
    for stage in ("tokenizer", "stage_a"):
        assert train(config, stage, tmp_path / "shades", tmp_path / "run") == 0
    network = StageA.from_pretrained(tmp_path / "run" / "model" / "vqgan")
    assert all(torch.isfinite(value).all() for value in network.state_dict().values() if value.is_floating_point())


def test_a_folder_is_read_as_pictures_whatever_the_source(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 4)
    assert train(write_config(tmp_path, SOURCE), "tokenizer", pictures, tmp_path / "run") == 0
    assert (tmp_path / "run" / "pictures-read").is_file()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (SOURCE, "[data] lacks every, which "),
        (f"{SOURCE}\ndata.every = 0", "[data] every is 0; it must be at least 1."),
        (
            f"{SOURCE}\ndata.every = 1\nstage_a.data = {{ share = 3 }}",
            "[stage_a] data share is 3; it must be from 0 to 1.",
        ),
        (
            f"{SOURCE}\ndata.shades = 1",
            "[data] has an unknown name shades; it may hold size, other_sizes, other_sizes_every, source, every, share.",
        ),
        ("stage_a.data = { every = 5 }", "[stage_a] data has an unknown name every; it may hold none."),
        (
            'data.source = "no_such_module:Class"',
            "[data] source is 'no_such_module:Class'; it must be module:Class and importable: ",
        ),
        ('data.source = "training.dataset:Missing"', "; it must be module:Class and importable: "),
        (
            'data.source = "training.dataset"',
            "[data] source is 'training.dataset'; it must be module:Class, and this is not a class.",
        ),
        ("data.source = 3", "[data] source is 3; it must be a string."),
        ("", "shades is not a folder of pictures, and [data] names no source that could read it."),
    ],
)
def test_a_wrong_source(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: str, sentence: str) -> None:
    (tmp_path / "shades").write_text("20")
    assert train(write_config(tmp_path, changes), "tokenizer", tmp_path / "shades", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_training_knows_no_miniature() -> None:
    """It is for anybody's pictures."""
    for file in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"miniature", "scripts", "serving", "predict"}, file
