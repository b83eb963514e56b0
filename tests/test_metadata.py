"""Pictures written and read back with Pillow alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.metadata import save_picture

RECORD = {"prompt": "a café at night, “open”\n\0", "negative_prompt": "", "seed": 0, "guidance": 1.5, "version": "1"}
ENDINGS = ["png", "jpg", "webp"]


def noise(edge: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))


def read_record(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.text["Description"] if image.format == "PNG" else image.getexif()[0x010E])


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_ending_says_the_format_and_the_record_comes_back(tmp_path: Path, ending: str, kind: str) -> None:
    path = tmp_path / f"out-0.{ending}"
    save_picture(noise(), path, RECORD)
    assert read_record(path) == RECORD
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode) == (kind, (64, 64), "RGB")


def test_png_loses_nothing(tmp_path: Path) -> None:
    save_picture(noise(), tmp_path / "a.png", RECORD, quality=0)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(noise())).all()


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_quality_from_0_to_100(tmp_path: Path, ending: str) -> None:
    sizes, errors = [], []
    for quality in (0, 40, 80, 100):
        path = tmp_path / f"{quality}.{ending}"
        save_picture(noise(), path, RECORD, quality)
        sizes.append(path.stat().st_size)
        errors.append(np.abs(np.asarray(Image.open(path), dtype=float) - np.asarray(noise())).mean())
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("letter", ["a", "é", "🦊"])
def test_long_texts_are_shortened_only_where_they_must_be(tmp_path: Path, ending: str, letter: str) -> None:
    path = tmp_path / f"a.{ending}"
    long = {**RECORD, "prompt": letter * 100_000, "negative_prompt": letter * 100_000}
    save_picture(noise(), path, long)
    found = read_record(path)
    if ending == "jpg":
        assert found == {**RECORD, "prompt": letter * 2000, "negative_prompt": letter * 2000}
    else:
        assert found == long


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=6000), st.sampled_from(ENDINGS))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str, ending: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    save_picture(Image.new("RGB", (8, 8)), path, {"prompt": text})
    found = read_record(path)["prompt"]
    assert found == text or (ending == "jpg" and len(json.dumps(text)) > 60_000 and found == text[:2000])


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.gif must end in \.webp, \.jpg or \.png\."):
        save_picture(noise(), tmp_path / "a.gif", RECORD)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_same_every_time(tmp_path: Path) -> None:
    """So that callers may compare or cache by content: nothing in it tells the time."""
    for ending in ENDINGS:
        contents = set()
        for name in ("a", "b"):
            path = tmp_path / f"{name}.{ending}"
            save_picture(noise(), path, RECORD)
            contents.add(path.read_bytes())
        assert len(contents) == 1, ending
