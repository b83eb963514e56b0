"""Shards made in this process, by the class that every worker runs."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from bulk import run as runs
from bulk.maker import FLAGGED, Maker
from cascade import Cascade
from cascade.images.metadata import save_picture
from cascade.limits import LIMITS
from cascade.weights import ModelFolder
from scripts import command_line
from serving.inputs import check_inputs, request_from
from serving.metadata import Detail, metadata
from serving.record import Origin, Record
from tests.bulk.tables import SMALL, lines_of, make_run, members_of, open_picture, pictures_of
from tests.metadata import read_record
from tests.serving.web import Web
from tests.test_safety import save_classifier

PROMPTS = ["a cat", "two dogs", "a bee", "", "a red car", "rain"]


@pytest.fixture(autouse=True)
def _tiny(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    monkeypatch.setenv("CASCADE_DEVICE", "cpu")


def alone(cascade: Cascade, folder: Path, row: dict[str, Any], file: Path) -> bytes:
    """The file of a row's picture, as `Cascade.generate` and the writer of files make it."""
    inputs = check_inputs(row)
    request = request_from(inputs, cascade)
    (image,) = cascade.generate(request)
    origin = Origin.of(cascade, ModelFolder.open(folder))
    record = Record.of(request, inputs, origin, cascade.planner.sampling(request), hashed=True)
    said = metadata(record.of_picture(0, request.seed, *image.size), Detail.FULL)
    save_picture(image, file, said, row.get("output_quality", 80))
    return file.read_bytes()


def pngs_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(open_picture(one)) for name, one in members_of(folder).items() if name.endswith(".png")]


@pytest.mark.slow
def test_pictures_are_those_of_the_engine(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"prompt": prompt, "seed": seed, **SMALL} for seed, prompt in enumerate(PROMPTS)]
    rows[1] |= {"output_format": "webp", "output_quality": 30}
    make_run(tmp_path / "one", rows, batch=1)
    one = members_of(tmp_path / "one" / "out")
    cascade = Cascade.load(model_folder, "cpu")
    for place, row in enumerate(rows):
        name = f"0000{place // 4}{place % 4}.{row['output_format']}"
        assert one[name] == alone(cascade, model_folder, row, tmp_path / f"alone.{row['output_format']}"), name
    given = [f"--input={name}={value}" for name, value in rows[1].items()]
    assert command_line.main([*given, "-o", str(tmp_path / "predict.webp")]) == 0
    assert one["000001.webp"] == (tmp_path / "predict.webp").read_bytes()
    make_run(tmp_path / "four", rows, batch=4)
    four = members_of(tmp_path / "four" / "out")
    assert four.keys() == one.keys()
    for name in one:
        if name.endswith(".png"):
            images = [np.asarray(open_picture(members[name]), np.float32) for members in (one, four)]
            assert np.abs(images[0] - images[1]).mean() <= 1


def test_what_a_shard_has(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat", "num_images": 3, "seed": 2**32 - 2, "id": "x", **SMALL},
        {"prompt": "a dog", "guidance_scale_prior": 2.5, "id": None, **SMALL, "output_format": "webp"},
        {"prompt": "a bee", "width": 12, "seed": -1, "id": "\ud800"},
        "no",
        {"control_images": [], "id": "y", **SMALL},
    ]
    make_run(tmp_path, rows, keep=("id",), shard=3)
    output = tmp_path / "out"
    assert {file.name for file in output.iterdir() if file.is_file()} == {
        "run.json",
        *(f"0000{shard}{ending}" for shard in range(2) for ending in (".tar", ".parquet", "_stats.json")),
    }
    lines = lines_of(output)
    assert [line["key"] for line in lines] == [
        "000000-0",
        "000000-1",
        "000000-2",
        "000001",
        "000002",
        "000010",
        "000011",
    ]
    assert [line["seed"] for line in lines[:3]] == [2**32 - 2, 2**32 - 1, 0]
    assert [line["row"] for line in lines] == [0, 0, 0, 1, 2, 3, 4]
    assert [line["index"] for line in lines[:3]] == [0, 1, 2]
    assert [line["id"] for line in lines] == ["x", "x", "x", None, "?", None, "y"]
    assert [line["status"] for line in lines] == ["success"] * 4 + ["failed"] * 2 + ["success"]
    assert lines[4]["error"] == "width is 12; it must be a whole number from 64 to 4096."
    assert (lines[4]["prompt"], lines[4]["width"], lines[4]["seed"]) == ("a bee", None, 2**32 - 1)
    assert lines[5]["error"].startswith("Line 4 is no JSON: ")
    used = {
        "guidance_scale_prior": 2.5,
        "guidance_scale_decoder": 1.1,
        "steps_prior": 1,
        "width": 64,
        "control_images": None,
    }
    assert {name: lines[3][name] for name in used} == used
    assert lines[6]["prompt"] == LIMITS["prompt"].default
    assert all(line["seconds"] > 0 for line in lines if line["status"] == "success")
    members = members_of(output)
    assert len(pictures_of(output)) == 5
    assert members["000001.txt"] == b"a dog"
    said = json.loads(members["000001.json"])
    assert {name: lines[3][name] for name in said} == said
    assert {"key", "row", "prompt", "seed", "sha256", "seconds", "width"} <= said.keys()
    assert open_picture(members["000001.webp"]).size == (64, 64)
    assert read_record(members["000001.webp"])["inputs"]["prompt"] == "a dog"
    schemas = [parquet.read_schema(file) for file in sorted(output.glob("*.parquet"))]
    assert schemas[0] == schemas[1]
    assert {name for name in LIMITS if name not in schemas[0].names} == {"num_images", "previews"}
    stats = json.loads((output / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed"]) == (5, 4, 1)
    assert stats["errors"] == {lines[4]["error"]: 1}


def test_a_line_makes_its_picture_again(tmp_path: Path) -> None:
    """A row without a seed, too; and the second of a row's pictures."""
    make_run(tmp_path / "a", [{"prompt": "a cat", **SMALL}, {"prompt": "a dog", "num_images": 2, **SMALL}], batch=1)
    made = [line for line in lines_of(tmp_path / "a" / "out") if line["index"] in (0, 1)]
    again = [{name: line[name] for name in LIMITS if line.get(name) is not None} for line in made]
    make_run(tmp_path / "b", again, batch=1, seed=5)
    pictures = [pngs_of(tmp_path / run / "out") for run in "ab"]
    assert len(pictures[0]) == 3
    for one, other in zip(*pictures, strict=True):
        assert np.array_equal(one, other)


def test_a_shard_made_again_is_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "num_images": 1 + place % 2, **SMALL} for place, prompt in enumerate(PROMPTS)]
    maker = make_run(tmp_path, rows)
    before = {line["key"]: line for line in lines_of(tmp_path / "out")}
    (tmp_path / "out" / "00000_stats.json").unlink()
    assert runs.pending(maker.output, maker.run) == [0]
    Maker(maker.output.url).make(0)
    for line in lines_of(tmp_path / "out"):
        assert {**line, "seconds": 0} == {**before[line["key"]], "seconds": 0}
    assert len(pictures_of(tmp_path / "out")) == 9


@pytest.fixture
def weights(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model, in a folder that may be changed."""
    folder = tmp_path / "weights"
    shutil.copytree(model_folder, folder)
    monkeypatch.setenv("CASCADE_WEIGHTS", str(folder))
    return folder


def test_a_row_that_fails_while_it_is_made_fails_alone(tmp_path: Path, weights: Path) -> None:
    """The engine refuses the whole batch; the sentence is that of the row."""
    (weights / "embeddings").mkdir()
    (weights / "embeddings" / "bad.safetensors").write_bytes(b"no")
    rows = [{"prompt": prompt, "seed": 1, **SMALL} for prompt in ("a cat", "a embedding:bad", "a dog", "a bee")]
    make_run(tmp_path / "run", rows, batch=4)
    lines = lines_of(tmp_path / "run" / "out")
    assert [line["status"] for line in lines] == ["success", "failed", "success", "success"]
    assert lines[1]["error"].startswith("prompt names the embedding 'bad', but ")
    assert len(pictures_of(tmp_path / "run" / "out")) == 3


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A host of pictures."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    web = Web()
    yield web
    web.stop()


def test_pictures_as_inputs(tmp_path: Path, web: Web) -> None:
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(photo)
    (tmp_path / "no.png").write_text("no picture")
    rows = [
        {"image": "photo.png", **SMALL},
        {"image": f"@{photo}", **SMALL},
        {"image": f"{web.url}/picture", **SMALL},
        {"image": f"{web.url}/status?code=404", **SMALL},
        {"image": "no.png", **SMALL},
        {"image": "nowhere.png", **SMALL},
        {"image_prompts": ["photo.png", f"{web.url}/picture"], **SMALL},
        {"image": "photo.png", "mask": "photo.png", **{name: SMALL[name] for name in ("steps_prior", "steps_decoder")}},
        {"image": "data:image/png;base64,AAAA", **SMALL},
    ]
    rows = [{"prompt": "a cat", "seed": 3, "prompt_strength": 0.5, **row} for row in rows]
    make_run(tmp_path, rows, batch=4)
    lines = lines_of(tmp_path / "out")
    failed = {line["row"]: line["error"] for line in lines if line["status"] == "failed"}
    assert failed.keys() == {3, 4, 5, 8}
    assert failed[3].startswith(f"image could not be downloaded from {web.url.removeprefix('http://')}: ")
    assert failed[4].startswith("image ")
    assert failed[5].startswith("image is 'nowhere.png'; there is no file ")
    assert [lines[place]["image"] for place in (0, 2, 8)] == [
        "photo.png",
        f"{web.url}/picture",
        "data:image/png;base64,",
    ]
    assert lines[6]["image_prompts"] == ["photo.png", f"{web.url}/picture"]
    pictures = pngs_of(tmp_path / "out")
    assert len(pictures) == 4, "and one in WebP"
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_flagged_pictures_are_left_out(tmp_path: Path, weights: Path) -> None:
    save_classifier(weights / "safety_checker", {"normal": 0.0, "nsfw": 50.0})
    rows = [{"prompt": "a cat", "disable_safety_checker": place == 1, **SMALL} for place in range(3)]
    make_run(tmp_path / "run", rows, batch=4)
    lines = lines_of(tmp_path / "run" / "out")
    assert [line["error"] for line in lines] == [FLAGGED, None, FLAGGED]
    assert pictures_of(tmp_path / "run" / "out").keys() == {"000001"}


def test_progress_is_told(tmp_path: Path) -> None:
    told = []
    maker = make_run(tmp_path, [{"prompt": prompt, **SMALL} for prompt in PROMPTS[:3]] + [{"width": 1}], shard=4)
    (tmp_path / "out" / "00000_stats.json").unlink()
    maker.make(0, lambda *done: told.append(done))
    assert told == [(3, 2, 1), (4, 3, 1)]
