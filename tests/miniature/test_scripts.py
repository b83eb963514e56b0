"""What scripts/build-mini-data and scripts/evaluate-mini do, with few drawings; train-mini is in test_stages.py."""

import io
import json
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from cascade.weights import DISTILLED
from miniature.icons import ICON_SETS, STYLES, load_drawings, load_objects
from scripts import build_mini_data, evaluate_mini, train_mini
from scripts.stand_ins import shapes_of, write_lora
from tests.miniature.small import pack, quick_packing

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
    with quick_packing():
        build_mini_data.build(icons / "drawings.zip", icons, icons / "objects.json")
    return icons / "drawings.zip"


@pytest.fixture(scope="module")
def small_mini(quick_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`quick_mini` with pictures of 128 pixels a side."""
    folder = shutil.copytree(quick_mini, tmp_path_factory.mktemp("weights") / "mini", symlinks=True)
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**content, "native_size": 128}))
    return folder


@pytest.mark.slow
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


@pytest.mark.slow
def test_evaluation(drawings: Path, small_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sets; a third one joins them without the first two being judged again."""
    options = ["--drawings", str(drawings), "--output", str(tmp_path / "out"), "--prompts", "4", "--batch", "2"]
    options += ["--try", "guidance_scale_prior=1,steps_prior=2", "--seed", "7", "--weights", str(small_mini)]
    assert evaluate_mini.main([*options, "--sets", "2"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].startswith("2 sets of 4 prompts, --seed 7, 8, on cpu. In brackets, the 95 % interval")
    assert lines[2] == "| score | scenes | A | B + A | C + B + A | guidance_scale_prior=1,steps_prior=2 |"
    assert lines[4].startswith("| object first | 100.0 % (61.0 to 100.0) |")  # six pictures of one object
    assert [line.split(":")[0] for line in lines if "on 2 scenes with combinations" in line] == ["A", "B + A"]
    assert (tmp_path / "out" / "table.md").read_text() == said
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["scores"]["text"]["scenes"]["object first"] == {
        "mean": 1.0,
        "low": pytest.approx(0.61, abs=0.001),
        "high": 1.0,
        "count": 6,
    }
    folder = tmp_path / "out" / "set-7"
    sheets = {file.name: Image.open(file).size for file in folder.glob("*.png")}
    names = ("scenes-0.png", "a-0.png", "ba-0.png", "cba-0.png", "guidance_scale_prior=1,steps_prior=2-0.png")
    assert sheets == dict.fromkeys(names, (10 * 128, 128))
    assert len((folder / "verdicts.tsv").read_text().splitlines()) == 5

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("set-[78]*")}
    assert evaluate_mini.main([*options, "--sets", "3"]) == 0
    assert capsys.readouterr().out.startswith("3 sets of 4 prompts, --seed 7, 8, 9, on cpu.")
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_comparison(drawings: Path, small_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--drawings", str(drawings), "--output", str(tmp_path / "out"), "--seed", "7", "--count", "2"]
    options += ["--weights", str(small_mini), "--compare", "fast", "steps_prior=2,sampler=ddim,guidance_interval=0:0.5"]
    assert evaluate_mini.main(options) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    # Of four drawings, no two are kept from training, so there is no unseen prompt of two.
    assert lines[0] == "2 prompts of one object and 1 of two, --seed 7, on cpu."
    assert lines[3].startswith(
        "steps_prior=2,sampler=ddim,guidance_interval=0:0.5: Stage C 2 steps of ddim with guidance 4 from"
    )
    assert lines[5] == "| score | exact | fast | steps_prior=2,sampler=ddim,guidance_interval=0:0.5 |"
    assert (tmp_path / "out" / "compare-7.md").read_text() == said
    content = json.loads((tmp_path / "out" / "compare-7.json").read_text())
    for name in ("exact", "fast"):
        values = content["judged"][name]["values"]
        assert (len(values["object first"]), len(values["both objects first"])) == (2, 1)
    assert evaluate_mini.main([*options[:-2], "turbo"]) == 1
    assert capsys.readouterr().err.startswith("speed is 'turbo', which needs distilled weights")
    folder = shutil.copytree(small_mini, tmp_path / "mini")
    (folder / DISTILLED).parent.mkdir()
    write_lora(folder / DISTILLED, shapes_of(folder, ("prior", "decoder")), 2)
    options[options.index(str(small_mini))] = str(folder)
    assert evaluate_mini.main([*options[:-2], "turbo"]) == 0
    assert "\n| score | exact | turbo |\n" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluation_of_images(
    drawings: Path, small_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--drawings", str(drawings), "--output", str(tmp_path / "out"), "--prompts", "4", "--sets", "1"]
    assert evaluate_mini.main([*options, "--images", "1", "--weights", str(small_mini)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("4 prompts, --seed ")
    assert "Image-to-image: scenes at each prompt_strength" in output.out
    assert re.search(r"^\| similarity \| \d+\.\d %", output.out, re.MULTILINE)


@pytest.mark.slow
def test_evaluation_of_loras(
    drawings: Path,
    small_mini: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tables are kept for the model card."""
    data = shutil.copytree(drawings.parent, tmp_path / "data") / drawings.name
    pack(NAMES, data.with_name("ink-drawings.zip"), ("ink",))
    (tmp_path / "loras").mkdir()
    for file in ("ink", "pim"):
        write_lora(tmp_path / "loras" / f"{file}.safetensors", shapes_of(small_mini), 2)
    monkeypatch.setattr(evaluate_mini, "judge_style", partial(evaluate_mini.judge_style, count=2))
    monkeypatch.setattr(evaluate_mini, "judge_subject", partial(evaluate_mini.judge_subject, count=2, more=2))
    options = ["--drawings", str(data), "--output", str(tmp_path / "out"), "--seed", "7", "--weights", str(small_mini)]
    assert evaluate_mini.main([*options, "--loras", str(tmp_path / "loras")]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "out" / "loras-7.md").read_text() == said
    for row in ("| style first, untrained | ", "| subject first | ", "| score | without | with |"):
        assert f"\n{row}" in said


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--sets", "0"], "--sets is 0; it must be at least 1"),
        (["--prompts", "3"], "--prompts is 3; it must be at least 4"),
        (["--seed", "-1"], "--seed is -1; it must be at least 0"),
        (["--try", "guidance=8"], "--try: 'guidance=8' must be KEY=VALUE, and KEY one of steps_prior, steps_decoder,"),
        (["--try", "steps_prior=8.5"], "--try: 'steps_prior=8.5' must have a whole number."),
        (["--try", "steps_prior=0"], "--try: steps_prior is 0;"),
        (["--compare", "quick"], "--compare: 'quick' must be KEY=VALUE, and KEY one of steps_prior,"),
        (["--compare", "fast", "speed=quick"], "--compare: speed is 'quick'; it must be one of exact, fast, turbo."),
        (["--compare", "guidance_interval=0.5"], "--compare: guidance_interval has 1 value; it must have 2."),
        (["--compare", "fast", "--count", "1"], "--count is 1; it must be at least 2"),
    ],
)
def test_wrong_options(option: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate_mini.main(option)
    assert sentence in capsys.readouterr().err


def test_evaluation_without_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--drawings", str(tmp_path / "none.zip"), "--output", str(tmp_path / "out")]
    assert evaluate_mini.main(options) == 1
    missing = tmp_path / "none.zip"
    assert capsys.readouterr().err == f"There is no file {missing}; scripts/build-mini-data makes it.\n"


def test_training_with_a_wrong_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_mini.main(["--config", str(tmp_path / "none.toml"), "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"There is no configuration file {tmp_path / 'none.toml'}.\n"
