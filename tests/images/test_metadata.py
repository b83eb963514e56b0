"""Pictures written and read back, with Pillow alone and with exiftool."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.images.metadata import Metadata, SourceType, save_picture
from tests.metadata import read_texts

ENDINGS = ["png", "jpg", "webp"]
SCRIPTS = {
    "Latin": "a café at night, “open”\nand a second line\tindented",
    "Chinese": "一只红色的苹果在绿色背景上，夜晚",
    "Arabic": "تفاحة حمراء على خلفية خضراء",
    "emoji": "🦊🍎👩‍🚀",
    "one sign": "中",
}


def said(text: str, source: SourceType = SourceType.CREATED) -> Metadata:
    return Metadata(source, json.dumps({"prompt": text}), f"{text}\nSteps: 1")


def noise(edge: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))


@pytest.mark.parametrize(("ending", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_the_ending_says_the_format_and_the_texts_come_back(tmp_path: Path, ending: str, kind: str, text: str) -> None:
    path = tmp_path / f"out-0.{ending}"
    for source in SourceType:
        save_picture(noise(), path, [said(text, source)])
        assert read_texts(path) == (json.dumps({"prompt": text}), f"{text}\nSteps: 1", source.value)
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode) == (kind, (64, 64), "RGB")


@pytest.mark.parametrize("ending", ENDINGS)
def test_empty_texts_are_left_out(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    save_picture(noise(), path, [Metadata(SourceType.CREATED)])
    assert read_texts(path) == ("", "", SourceType.CREATED.value)
    with Image.open(path) as image:
        assert not image.getexif()
        assert set(getattr(image, "text", {})) <= {"XML:com.adobe.xmp"}
    for only in (Metadata(SourceType.CREATED, "{}"), Metadata(SourceType.CREATED, parameters="Steps: 1")):
        save_picture(noise(), path, [only])
        assert read_texts(path) == (only.description, only.parameters, only.source.value)


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("ending", ENDINGS)
def test_exiftool_reads_all(tmp_path: Path, ending: str) -> None:
    """One file per script, because exiftool guesses the byte order of a comment from its content."""
    files = {tmp_path / f"{index}.{ending}": text for index, text in enumerate(SCRIPTS.values())}
    for file, text in files.items():
        save_picture(noise(), file, [said(text)])
    command = ["exiftool", "-json", "-G1", "-Description", "-ImageDescription", "-Parameters", "-UserComment"]
    done = subprocess.run([*command, "-DigitalSourceType", "-Warning", *files], capture_output=True, check=True)
    for found in json.loads(done.stdout):
        text = files[Path(found.pop("SourceFile"))]
        description, parameters = (
            ("PNG:Description", "PNG:Parameters")
            if ending == "png"
            else ("IFD0:ImageDescription", "ExifIFD:UserComment")
        )
        assert found == {
            description: json.dumps({"prompt": text}),
            parameters: f"{text}\nSteps: 1",
            "XMP-iptcExt:DigitalSourceType": SourceType.CREATED.value,
        }


def test_png_loses_nothing(tmp_path: Path) -> None:
    save_picture(noise(), tmp_path / "a.png", [said("")], quality=0)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == np.asarray(noise())).all()


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_quality_from_0_to_100(tmp_path: Path, ending: str) -> None:
    sizes, errors = [], []
    for quality in (0, 40, 80, 100):
        path = tmp_path / f"{quality}.{ending}"
        save_picture(noise(), path, [said("")], quality)
        sizes.append(path.stat().st_size)
        errors.append(np.abs(np.asarray(Image.open(path), dtype=float) - np.asarray(noise())).mean())
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_shorter_version_is_written_only_where_the_format_has_no_room(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    versions = [said("é" * length) for length in (100_000, 20_000, 5_000, 100)]
    save_picture(noise(), path, versions)
    expected = versions[2] if ending == "jpg" else versions[0]
    assert read_texts(path)[:2] == (expected.description, expected.parameters)


@pytest.mark.parametrize(("length", "whole"), [(65_499, True), (65_500, False)])
def test_a_jpeg_is_filled_to_the_last_byte(tmp_path: Path, length: int, whole: bool) -> None:
    """Other bytes: EXIF's marker 6, TIFF's header 8, a directory with one entry 18, a NUL, padding to an even length."""
    versions = [Metadata(SourceType.CREATED, "a" * length), Metadata(SourceType.CREATED, "short")]
    save_picture(noise(), tmp_path / "a.jpg", versions)
    assert read_texts(tmp_path / "a.jpg").description == versions[0 if whole else 1].description


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3000), st.sampled_from(ENDINGS)
)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str, ending: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{ending}"
    save_picture(Image.new("RGB", (8, 8)), path, [said(text)])
    assert read_texts(path)[:2] == (json.dumps({"prompt": text}), f"{text}\nSteps: 1")


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.gif must end in \.webp, \.jpg or \.png\."):
        save_picture(noise(), tmp_path / "a.gif", [said("")])
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_the_same_every_time(tmp_path: Path) -> None:
    """Files contain no time, so that callers can compare or cache them by content."""
    for ending in ENDINGS:
        contents = set()
        for name in ("a", "b"):
            path = tmp_path / f"{name}.{ending}"
            save_picture(noise(), path, [said("a cat")])
            contents.add(path.read_bytes())
        assert len(contents) == 1, ending
