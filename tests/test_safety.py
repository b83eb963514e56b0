"""The safety checker on tiny vision transformers with random weights, whose biases say what they see."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from cascade.safety import SafetyChecker, find_safety_checker
from cascade.weights import ModelFolder, WeightsError, write_model_json

PICTURE = Image.new("RGB", (50, 30), "orange")


def save_classifier(folder: Path, labels: dict[str, float]) -> Path:
    """A classifier in the form that is published, with these classes and the biases of their logits."""
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    model = ViTForImageClassification(config)
    model.classifier.weight.data.mul_(0.01)
    model.classifier.bias.data = torch.tensor(list(labels.values()))
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "safety_checker", {"normal": 0.0, "nsfw": 5.0})


@pytest.mark.parametrize(
    ("labels", "flagged"),
    [
        ({"normal": 0.0, "nsfw": 5.0}, True),
        ({"normal": 5.0, "nsfw": 0.0}, False),
        ({"NSFW": 0.0, "SFW": 5.0}, False),
        ({"NSFW": 5.0, "SFW": 0.0}, True),
        ({"unsafe": 5.0, "safe": 0.0}, True),
        # None of the unsafe classes is the likeliest, but together they are.
        ({"porn": 2.0, "drawing": 2.3, "hentai": 2.0, "neutral": -5.0}, True),
        ({"porn": 0.0, "drawing": 2.3, "hentai": 0.0, "neutral": -5.0}, False),
    ],
)
def test_what_is_flagged(tmp_path: Path, labels: dict[str, float], flagged: bool) -> None:
    checker = SafetyChecker.load(save_classifier(tmp_path / "c", labels))
    assert checker.flags(PICTURE) is flagged
    assert checker.flags(Image.new("RGB", (64, 256))) is flagged


def test_the_picture_decides(folder: Path) -> None:
    """With the bias between the two pictures' logits, one is flagged and the other is not."""
    checker = SafetyChecker.load(folder)
    checker.classifier.classifier.bias.data.zero_()
    pictures = [Image.new("RGB", (32, 32), "black"), Image.new("RGB", (64, 48), "white")]
    margins = []
    with torch.no_grad():
        for picture in pictures:
            logits = checker.classifier(checker.processor(picture, return_tensors="pt").pixel_values).logits[0]
            margins.append(float(logits[1] - logits[0]))
    checker.classifier.classifier.bias.data[1] = -sum(margins) / 2
    assert [checker.flags(picture) for picture in pictures] == [margins[0] > margins[1], margins[1] > margins[0]]


def test_the_processor_needs_nothing_that_is_not_installed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    SafetyChecker.load(folder).flags(PICTURE)
    assert "torchvision" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is missing"):
        SafetyChecker.load(folder)


def test_pickles_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        SafetyChecker.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_truncated_files(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=f"{folder} holds no readable image classifier: ") as error:
        SafetyChecker.load(folder)
    assert "\n" not in str(error.value)


def test_an_unknown_classifier_is_told_in_one_short_line(folder: Path) -> None:
    """transformers answers with a list of all that it knows."""
    (folder / "config.json").write_text('{"model_type": "unheard of"}')
    with pytest.raises(WeightsError, match=f"{folder} holds no readable image classifier: ") as error:
        SafetyChecker.load(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_weights_are_never_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"model\.safetensors lacks classifier\.bias\."):
        SafetyChecker.load(folder)


def test_a_classifier_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json has the classes cat, dog; one of them must be called "):
        SafetyChecker.load(save_classifier(tmp_path / "c", {"cat": 0.0, "dog": 0.0}))


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert find_safety_checker(model) is None
    (tmp_path / "safety_checker").mkdir()
    assert find_safety_checker(model) == tmp_path / "safety_checker"
    monkeypatch.chdir(model)
    assert find_safety_checker(Path()) == tmp_path / "safety_checker"
    (model / "safety_checker").mkdir()
    assert find_safety_checker(model) == model / "safety_checker"


def test_damage_to_the_checker_of_a_model_folder(model_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    folder = save_classifier(model / "safety_checker", {"normal": 0.0, "nsfw": 5.0})
    about = ModelFolder.open(model)
    write_model_json(
        model, name=about.name, license=about.license, native_size=about.native_size, sampler=about.sampler
    )
    SafetyChecker.load(folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))
    with pytest.raises(WeightsError, match=rf"{file} is damaged: its content differs from the checksums in"):
        SafetyChecker.load(folder)
    file.write_bytes(content)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(WeightsError, match=rf"{folder / 'config.json'} is damaged: its checksum is not the one in"):
        SafetyChecker.load(folder)
