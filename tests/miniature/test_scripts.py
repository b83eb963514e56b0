"""What scripts/build-mini-data and scripts/evaluate-mini do, with few drawings; train-mini is in test_stages.py."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from miniature.evaluate import make_prompts, save_prompts
from miniature.icons import ICON_SETS, STYLES, load_drawings, load_objects
from scripts import build_mini_data, evaluate_mini, train_mini

NAMES = ("cat", "dog", "owl", "fox")


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The icon sets' packages, with four icons each."""
    folder = tmp_path_factory.mktemp("icons")
    for number, icon_set in enumerate(ICON_SETS):
        circle = '<circle cx="8" cy="8" r="{}" fill="hsl({}, 80%, 50%)"/>'
        bodies = {name: {"body": circle.format(4 + number, 90 * index)} for index, name in enumerate(NAMES)}
        content = json.dumps({"icons": bodies, "width": 16, "height": 16}).encode()
        about = tarfile.TarInfo("package/icons.json")
        about.size = len(content)
        with tarfile.open(build_mini_data.package_file(icon_set, folder), "w:gz") as archive:
            archive.addfile(about, io.BytesIO(content))
    return folder


@pytest.fixture(scope="module")
def drawings(icons: Path) -> Path:
    pytest.importorskip("resvg_py")
    build_mini_data.build(icons / "drawings.zip", icons, icons / "objects.json")
    return icons / "drawings.zip"


def test_drawings_of_what_all_sets_have(drawings: Path) -> None:
    _, names, styles = load_drawings(drawings)
    assert names == sorted(NAMES) == [item.name for item in load_objects(drawings.with_name("objects.json"))]
    assert styles == list(STYLES)


def test_a_damaged_package(icons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in icons.glob("*.tgz"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    assert build_mini_data.main(["--output", str(tmp_path / "drawings.zip"), "--icons", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "iconify-json-noto-1.2.9.tgz is not a complete package of @iconify-json/noto: " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "drawings.zip").exists()


def test_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_mini_data.main(["--output", str(tmp_path / "drawings.zip"), "--icons", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("npm is not installed, and ")


def test_evaluation(drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_prompts(make_prompts(sorted(NAMES), STYLES, 5, one=4, two=2), tmp_path / "prompts.json")
    files = ["--drawings", drawings, "--prompts", tmp_path / "prompts.json", "--output", tmp_path / "out"]
    assert evaluate_mini.main([*map(str, files), "--limit", "2", "--batch", "1", "--guidance", "1"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "| score | scenes | A | B + A | C + B + A | guidance 1 |"
    assert lines[2].startswith("| object first | 100.0 % |")
    assert [line.split(":")[0] for line in lines if "dB PSNR on 1 scenes with combinations" in line] == ["A", "B + A"]
    assert (tmp_path / "out" / "table.md").read_text() == said
    sheets = {file.name: Image.open(file).size for file in (tmp_path / "out").glob("*.png")}
    names = ("scenes-0.png", "a-0.png", "ba-0.png", "cba-0.png", "guidance-1-0.png")
    assert sheets == dict.fromkeys(names, (10 * 256, 256))
    assert len((tmp_path / "out" / "verdicts.tsv").read_text().splitlines()) == 3


def test_evaluation_without_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--drawings", str(tmp_path / "none.zip"), "--output", str(tmp_path / "out")]
    assert evaluate_mini.main(options) == 1
    missing = tmp_path / "none.zip"
    assert capsys.readouterr().err == f"There is no file {missing}: scripts/build-mini-data makes it.\n"


def test_training_with_a_wrong_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_mini.main(["--config", str(tmp_path / "none.toml"), "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"There is no configuration file {tmp_path / 'none.toml'}.\n"
