"""Trainings over HTTP: Cog's own server in training mode, the miniature, and a prediction with what came out."""

import base64
import io
import json
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from predict import Predictor
from tests.http.serving import MINI, Server, wait_for
from tests.test_predict import DEFAULTS
from tests.training.lora.zips import files_of, zipped
from tests.training.small import write_pictures

ANSWER = 300
pytestmark = pytest.mark.slow
SMALL = {"steps": 2, "lora_rank": 1, "resolution": 128, "seed": 3}


@pytest.fixture(scope="module")
def trainer(quick_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A training makes two pictures, too."""
    server = Server(tmp_path_factory.mktemp("trainer"), "--train", weights=quick_mini)
    try:
        assert wait_for(lambda: server.status() in ("READY", "SETUP_FAILED"), 180, "the start")
        assert server.status() == "READY", server.log.read_text()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = files_of(write_pictures(tmp_path_factory.mktemp("pictures"), 3))
    return url_of(zipped(files))


def url_of(content: bytes) -> str:
    return "data:application/zip;base64," + base64.b64encode(content).decode()


def ask(trainer: Server, **inputs: Any) -> dict[str, Any]:
    trainer.wait_until("READY")
    answer = requests.post(f"{trainer.url}/trainings", json={"input": inputs}, timeout=ANSWER)
    assert answer.status_code == 200, answer.text
    return answer.json()


def left(trainer: Server) -> list[str]:
    return [path.name for path in trainer.temporary.iterdir() if path.name.startswith("cascade-")]


def test_pictures_in_and_a_lora_out(
    trainer: Server, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ask(trainer, input_images=pictures, trigger_word="[sq]", begins_from="square", minutes=60, **SMALL)
    assert said["status"] == "succeeded", said
    content = base64.b64decode(said["output"]["weights"].partition(",")[2])
    (tmp_path / "lora.tar").write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}
    assert list(files) == ["lora.safetensors", "settings.json", "before.webp", "after.webp"]
    settings = json.loads(files["settings.json"])
    assert settings["finished"]
    assert (settings["options"]["steps"], settings["options"]["seed"], settings["lora"]["rank"]) == (2, 3, 1)
    assert settings["prompt"] == "[sq], a red square"
    for name in ("before.webp", "after.webp"):
        assert Image.open(io.BytesIO(files[name])).size == (256, 256)
    folder = shutil.copytree(MINI, tmp_path / "mini")
    (folder / "loras").mkdir(exist_ok=True)
    (tmp_path / "lora.tar").rename(folder / "loras" / "lora.tar")
    monkeypatch.setenv("CASCADE_WEIGHTS", str(folder))
    monkeypatch.setenv("CASCADE_LORA_CACHE", str(tmp_path / "cache"))
    predictor = Predictor()
    predictor.setup()
    given = {**DEFAULTS, "prompt": "a [sq]", "width": 64, "height": 64, "steps_prior": 1, "steps_decoder": 1, "seed": 1}
    plain, with_lora = (
        Path(predictor.run(**{**given, **more})[0]).read_bytes() for more in ({}, {"lora_weights": ["lora.tar"]})
    )
    assert plain != with_lora


def test_the_time_limit_returns_what_there_is(trainer: Server, pictures: str) -> None:
    said = ask(trainer, input_images=pictures, minutes=0.1, **{**SMALL, "steps": 20000})
    content = base64.b64decode(said["output"]["weights"].partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert not json.load(archive.extractfile("settings.json"))["finished"]
        assert archive.getmember("lora.safetensors").size > 1000


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"hello", "input_images is not a complete zip file."),
        (zipped({"../a.png": b"x"}), "input_images holds '../a.png', whose path leads out of the folder."),
        (zipped({"notes.pdf": b"x"}), "There are no pictures (.jpg, .jpeg, .png, .webp) in pictures."),
        (zipped({"a.png": b"x"}), "a.png is not a picture in one of the formats"),
        ("/etc/hosts", "input_images must be an http, https or data URL."),
        ("http://127.0.0.1:1/a.zip", "input_images could not be downloaded from 127.0.0.1:1"),
    ],
)
def test_what_is_wrong_is_one_sentence(trainer: Server, content: bytes | str, sentence: str) -> None:
    said = ask(trainer, input_images=content if isinstance(content, str) else url_of(content), **SMALL)
    assert said["status"] == "failed"
    assert sentence in said["error"]
    assert "\n" not in said["error"]
    assert left(trainer) == []


def test_inputs_are_checked_by_the_schema(trainer: Server, pictures: str) -> None:
    trainer.wait_until("READY")
    given = {"input_images": pictures, "steps": 0, "lora_rank": 129, "layers": "conv"}
    answer = requests.post(f"{trainer.url}/trainings", json={"input": given}, timeout=ANSWER)
    assert answer.status_code == 422
    assert {one["loc"][-1] for one in answer.json()["detail"]} == {"steps", "lora_rank", "layers"}
    answer = requests.post(f"{trainer.url}/trainings", json={"input": {}}, timeout=ANSWER)
    assert answer.status_code == 422


def test_a_cancel_leaves_nothing(trainer: Server, pictures: str) -> None:
    trainer.wait_until("READY")
    before = trainer.log.read_text().count("LoRA of rank")
    body = {"input": {"input_images": pictures, **SMALL, "steps": 20000}}
    answer = requests.put(f"{trainer.url}/trainings/a", json=body, headers={"Prefer": "respond-async"}, timeout=ANSWER)
    assert answer.status_code == 202
    wait_for(lambda: trainer.log.read_text().count("LoRA of rank") > before, ANSWER, "the training's first line")
    time.sleep(1)
    assert left(trainer)
    assert requests.post(f"{trainer.url}/trainings/a/cancel", timeout=ANSWER).status_code == 200
    trainer.wait_until("READY")
    wait_for(lambda: left(trainer) == [], 30, "nothing left")
    assert ask(trainer, input_images=pictures, **SMALL)["status"] == "succeeded"
