"""Records: what they say of a request, and how much of it goes into files."""

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cog import Path as CogPath
from PIL import Image

from cascade.guides.controls import Control
from cascade.images.metadata import SourceType, save_picture
from cascade.pipeline import Cascade
from cascade.plan import Sampling
from cascade.request import Request, upscaling
from cascade.weights import PUBLISHED_SAMPLER, ModelFolder
from scripts import command_line
from serving.metadata import LENGTHS, Detail, metadata
from serving.record import Embedding, Lora, Origin, Record, is_edited, weights_digest
from tests.metadata import read_record, read_texts

GREY = Image.new("RGB", (64, 64), "grey")
ORIGIN = Origin({"name": "Tiny"}, {"prior": {"shift": 2.0, "rescale": 0.7}}, {"type": "cpu"}, {"cascade": "0.1.0"})
SAMPLING = Sampling(**PUBLISHED_SAMPLER)
ASKED = {
    "prompt": "a red apple",
    "width": 64,
    "height": 72,
    "num_images": 2,
    "seed": 7,
    "steps_prior": 20,
    "steps_decoder": 10,
    "guidance_scale_prior": 4.0,
    "guidance_scale_decoder": 1.1,
}
GIVEN = {"self": None, "negative_prompt": "", "aspect_ratio": "1:1", "width": None, "seed": None, "previews": True}


def record(request: Request | None = None, hashed: bool = True, **given: Any) -> Record:
    made = Record.of(request or Request(**ASKED), {**GIVEN, **given}, ORIGIN, SAMPLING, hashed=hashed)
    return made.of_picture(1, 8, 64, 72)


def test_inputs_are_resolved() -> None:
    found = record(prompt="a red apple", num_images=2.0, upscale=False, control_types=[], output_quality=80).inputs
    assert found == {**ASKED, "negative_prompt": "", "output_quality": 80}
    assert type(found["num_images"]) is int


def test_inputs_that_are_ignored_are_left_out(tmp_path: Path) -> None:
    given = {"prompt_strength": 0.8, "ip_adapter_mode": "all"}
    assert not set(given) & set(record(**given).inputs)
    GREY.save(tmp_path / "a.png")
    file = CogPath(tmp_path / "a.png")
    assert set(given) < set(record(**given, image=file, ip_adapter_images=[file]).inputs)


def test_enlarging_has_no_size() -> None:
    asked = {name: value for name, value in ASKED.items() if name not in ("width", "height")}
    assert not {"width", "height"} & set(record(upscaling(GREY, **asked), upscale=True).inputs)


def test_files_are_known_by_the_digests_of_their_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    a, b = CogPath(tmp_path / "a"), CogPath(tmp_path / "b")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    found = record(image=b, image_prompts=[a, b], outpaint=[0, 0, 1, 1])
    assert found.files == (
        {"input": "image", "sha256": digests["b"]},
        {"input": "image_prompts", "index": 0, "sha256": digests["a"]},
        {"input": "image_prompts", "index": 1, "sha256": digests["b"]},
    )
    assert not {"image", "image_prompts"} & set(found.inputs)
    assert found.inputs["outpaint"] == [0, 0, 1, 1]
    assert record(hashed=False, image=b).files == ({"input": "image"},)


def test_the_json_object() -> None:
    found = json.loads(record(prompt="苹果").to_json())
    assert record(prompt="苹果").to_json().isascii()
    assert found == {
        "inputs": {**ASKED, "prompt": "苹果", "negative_prompt": ""},
        "picture": {"index": 1, "seed": 8, "width": 64, "height": 72},
        "model": {"name": "Tiny"},
        "sampling": {"sampler": "ddpm", "prior": {"shift": 2.0, "rescale": 0.7}},
        "device": {"type": "cpu"},
        "versions": {"cascade": "0.1.0"},
    }


def test_what_a_speed_changes_besides_inputs() -> None:
    prior = replace(PUBLISHED_SAMPLER["prior"], sampler="ddim")
    sampling = Sampling(prior, PUBLISHED_SAMPLER["decoder"], (0.0, 0.75))
    found = json.loads(Record.of(Request(**ASKED), GIVEN, ORIGIN, sampling, hashed=False).to_json())["sampling"]
    assert found == {"sampler": "ddim", "prior": {"shift": 2.0, "rescale": 0.7, "guidance_interval": [0.0, 0.75]}}
    both = Origin({}, {"prior": {}, "decoder": {"shift": 1.0}}, {}, {})
    found = json.loads(Record.of(Request(**ASKED), GIVEN, both, sampling, hashed=False).to_json())["sampling"]
    assert found["decoder"] == {"shift": 1.0, "sampler": "ddpm"}


def test_loras_have_a_place() -> None:
    adapted = Record({}, (), "ddpm", ORIGIN, edited=False, loras=(Lora("ink", "ab", 0.5),))
    assert json.loads(adapted.to_json())["loras"] == [{"name": "ink", "sha256": "ab", "scale": 0.5}]


def test_embeddings_are_part_of_the_prompts() -> None:
    named = Record({}, (), "ddpm", ORIGIN, edited=False, embeddings=(Embedding("ink", "ab"),))
    assert json.loads(named.to_json())["embeddings"] == [{"name": "ink", "sha256": "ab"}]
    assert "ink" not in named.without_texts().to_json()


@pytest.mark.parametrize(
    ("options", "edited"),
    [
        ({}, False),
        ({"image_prompts": (GREY,)}, False),
        ({"controls": (Control("canny", GREY),)}, False),
        ({"image": GREY}, True),
        ({"image": GREY, "prompt_strength": 0.0}, True),
        ({"image": GREY, "prompt_strength": 1.0}, False),
        ({"image": GREY, "prompt_strength": 1.0, "mask": GREY}, True),
        ({"controls": (Control("super_resolution", GREY),)}, True),
    ],
)
def test_only_what_keeps_something_of_an_image_is_edited(options: dict[str, Any], edited: bool) -> None:
    request = Request("", **options)
    assert is_edited(request) is edited
    asked = {name: value for name, value in ASKED.items() if name not in ("width", "height")}
    (first, *_) = metadata(record(Request(**asked, **options)), Detail.FULL)
    assert first.source is (SourceType.EDITED if edited else SourceType.CREATED)


def test_details() -> None:
    secret = "a secret apple"
    made = Record(
        {**ASKED, "prompt": secret, "negative_prompt": secret},
        ({"input": "image", "sha256": "ab"},),
        "ddpm",
        ORIGIN,
        edited=False,
    ).of_picture(0, 7, 64, 72)
    (full, *_) = metadata(made, Detail.FULL)
    assert json.loads(full.description)["inputs"]["negative_prompt"] == secret
    assert full.parameters.startswith(f"{secret}\nNegative prompt: {secret}\nSteps: 20, ")
    (some, *_) = metadata(made, Detail.SETTINGS)
    found = json.loads(some.description)
    assert found["inputs"] == {name: value for name, value in ASKED.items() if name != "prompt"}
    assert found["files"] == [{"input": "image"}]
    assert some.parameters.startswith("Steps: 20, ")
    (none,) = metadata(made, Detail.NONE)
    assert (none.source, none.description, none.parameters) == (SourceType.CREATED, "", "")


def test_prompts_are_cut_in_both_texts() -> None:
    made = record(prompt="🦊" * 10_000, negative_prompt="a" * 3000)
    versions = list(metadata(made, Detail.FULL))
    for version, length in zip(versions, LENGTHS, strict=True):
        found = json.loads(version.description)
        assert found["inputs"]["prompt"] == "🦊" * (length or 10_000)
        assert found["inputs"]["negative_prompt"] == "a" * min(length or 3000, 3000)
        assert found.get("prompts_cut") == length
        assert version.parameters.count("🦊") == (length or 10_000)


@pytest.mark.parametrize(
    ("sign", "length"),
    [("a", 10_000), ("é", 2500), ("中", 2500), ("🦊", 1250), ("\x01", 5000), ('"', 5000), ("\0", 5000)],
)
def test_the_longest_prompts_in_a_jpeg(tmp_path: Path, sign: str, length: int) -> None:
    """10,000 characters each are the most that a request may have; PNG and WebP hold them whole."""
    made = record(prompt=sign * 10_000, negative_prompt=sign * 10_000)
    for ending, expected in {"jpg": length, "webp": 10_000, "png": 10_000}.items():
        save_picture(GREY, tmp_path / f"a.{ending}", metadata(made, Detail.FULL))
        found = read_record(tmp_path / f"a.{ending}")
        assert found["inputs"]["prompt"] == found["inputs"]["negative_prompt"] == sign * expected
        assert found.get("prompts_cut") == (None if expected == 10_000 else expected)


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASCADE_METADATA", raising=False)
    assert Detail.from_environment() is Detail.FULL
    for value, detail in {"": "full", "full": "full", "settings": "settings", "none": "none"}.items():
        monkeypatch.setenv("CASCADE_METADATA", value)
        assert Detail.from_environment() is Detail(detail)
    for value in ("Full", "no", " none"):
        monkeypatch.setenv("CASCADE_METADATA", value)
        sentence = f"^CASCADE_METADATA is {value!r}; it must be one of full, settings, none\\.$"
        with pytest.raises(ValueError, match=sentence):
            Detail.from_environment()


def test_the_command_line_asks_the_environment(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    monkeypatch.setenv("CASCADE_METADATA", "none")
    asked = ["-i", "prompt=a secret", "-i", "width=64", "-i", "height=64", "-o", str(tmp_path / "a.jpg")]
    assert command_line.main(asked) == 0
    assert read_texts(tmp_path / "a.jpg") == ("", "", SourceType.CREATED.value)
    assert "secret" not in "".join(capsys.readouterr())
    monkeypatch.setenv("CASCADE_METADATA", "some")
    assert command_line.main(asked) == 1
    assert capsys.readouterr().err == "CASCADE_METADATA is 'some'; it must be one of full, settings, none.\n"


def test_the_digest_of_the_weights_is_that_of_what_sha256sum_prints(model_folder: Path) -> None:
    opened = ModelFolder.open(model_folder)
    files = sorted(path.relative_to(model_folder).as_posix() for path in model_folder.rglob("*/*"))
    printed = subprocess.run(["sha256sum", *files], cwd=model_folder, capture_output=True, check=True).stdout
    assert weights_digest(opened) == hashlib.sha256(printed).hexdigest()


def test_the_digest_ignores_what_makes_no_pictures() -> None:
    def folder(**files: str) -> ModelFolder:
        return ModelFolder(Path(), "", "", 64, {}, {}, {path.replace("__", "/"): sum_ for path, sum_ in files.items()})

    base = folder(prior__config="a", vqgan__config="b")
    assert weights_digest(folder(vqgan__config="b", prior__config="a")) == weights_digest(base)
    assert weights_digest(folder(prior__config="a", vqgan__config="b", safety_checker__x="c")) == weights_digest(base)
    assert weights_digest(folder(prior__config="c", vqgan__config="b")) != weights_digest(base)
    assert weights_digest(folder()) is None


def test_the_origin(model_folder: Path) -> None:
    opened = ModelFolder.open(model_folder)
    for memory in ("resident", "offload"):
        origin = Origin.of(Cascade.load(model_folder, "cpu", memory=memory), opened)
        assert origin.model == {"name": "Tiny", "sha256": weights_digest(opened)}
        assert origin.device == {"type": "cpu", "dtype": "float32", "memory": "resident"}
        assert origin.sampling == {
            "prior": {"shift": 2.0, "rescale": 0.7},
            "decoder": {"shift": 1.0, "rescale": 0.7},
        }
        assert origin.versions["torch"] == torch.__version__
        assert {"cascade", "tokenizers", "pillow", "webp"} < set(origin.versions)
        json.dumps(vars(origin))
    eight = Origin.of(Cascade.load(model_folder, "cpu", precision="int8"), opened)
    assert eight.device == {"type": "cpu", "dtype": "float32", "precision": "int8", "memory": "resident"}
