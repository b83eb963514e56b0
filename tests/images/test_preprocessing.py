"""What CLIP's vision tower reads, against transformers' processor on the same settings."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from cascade.images.preprocessing import ClipPreprocessor

SETTINGS = [
    {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    {"size": 20, "crop_size": 33},
    {"size": {"height": 24, "width": 40}, "crop_size": {"height": 21, "width": 18}, "resample": 2},
    {"image_mean": 0.4, "image_std": 0.3, "do_convert_rgb": False},
    {"rescale_factor": 0.01, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
]


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(64, 64), (100, 70), (33, 200), (20, 20), (7, 5)]
    colours = [Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]
    return [one.convert(mode) for one in colours for mode in ("RGB", "RGBA", "L", "P", "LA")]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_equal_transformers(tmp_path: Path, settings: dict) -> None:
    said = {"image_processor_type": "CLIPImageProcessor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    ours, theirs = ClipPreprocessor.from_pretrained(tmp_path), CLIPImageProcessorPil.from_pretrained(tmp_path)
    for picture in pictures():
        picture = picture.convert("RGB") if settings.get("do_convert_rgb") is False else picture
        assert torch.equal(ours([picture]), theirs([picture], return_tensors="pt").pixel_values)
    assert ours(pictures()[:3]).shape[0] == 3


def test_either_reads_the_others_file(tmp_path: Path) -> None:
    made = ClipPreprocessor(size=32, crop=(30, 28), mean=(0.1, 0.2, 0.3))
    made.save_pretrained(tmp_path / "ours")
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "ours")
    (picture,) = pictures()[:1]
    assert torch.equal(made([picture]), theirs([picture], return_tensors="pt").pixel_values)
    theirs.save_pretrained(tmp_path / "theirs")
    assert ClipPreprocessor.from_pretrained(tmp_path / "theirs") == made


def test_a_step_that_clip_needs(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    with pytest.raises(ValueError, match="do_normalize is false"):
        ClipPreprocessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "said",
    [
        {"size": "x"},
        {"size": None},
        {"size": 1025},
        {"size": {"height": 10**9, "width": 64}},
        {"crop_size": 10**6},
        {"image_mean": math.nan},
        {"image_mean": 10**400},
        {"image_std": math.inf},
        {"image_std": [1e-320, 1, 1]},
        {"rescale_factor": math.nan},
        {"rescale_factor": 10**400},
        {"rescale_factor": 0},
        {"size": 0},
        {"size": 22.5},
        {"size": {"longest_edge": 64}},
        {"size": {"height": 64, "width": -1}},
        {"crop_size": [64, 64]},
        {"crop_size": {"height": 64}},
        {"resample": 99},
        {"resample": "x"},
        {"rescale_factor": "x"},
        {"rescale_factor": None},
        {"image_mean": [0.5]},
        {"image_mean": [0.5, "x", 0.5]},
        {"image_std": 0},
        {"image_std": "x"},
        {"image_std": [0.5, 0, 0.5]},
    ],
)
def test_a_setting_of_another_kind(tmp_path: Path, said: dict) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (name,) = said
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be "):
        ClipPreprocessor.from_pretrained(tmp_path)


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is not a JSON object"):
        ClipPreprocessor.from_pretrained(tmp_path)
