"""LoRAs and embeddings through the Predictor: used, recorded, and refused in one sentence."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from predict import Predictor
from tests.components import add_loras, copy_mini
from tests.metadata import read_record
from tests.serving.test_loras import Site, hub
from tests.test_predict import DEFAULTS

TINY = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 1, "output_format": "png", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with a LoRA, a word and a file that is neither."""
    folder = copy_mini(tmp_path_factory.mktemp("weights") / "mini")
    add_loras(folder)
    (folder / "loras" / "broken.safetensors").write_bytes(b"nothing")
    (folder / "turbo").mkdir()
    shutil.copy(folder / "loras" / "style.safetensors", folder / "turbo" / "turbo.safetensors")
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Predictor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(folder))
        patch.setenv("CASCADE_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        predictor = Predictor()
        predictor.setup()
        yield predictor


def run(predictor: Predictor, **given: Any) -> tuple[np.ndarray, dict[str, Any]]:
    (file,) = predictor.run(**{**DEFAULTS, **TINY, "prompt": "a red apple", **given})
    return np.array(Image.open(file)), read_record(Path(file))


@pytest.mark.slow
def test_loras_are_used_and_recorded(predictor: Predictor, folder: Path) -> None:
    base, record = run(predictor)
    assert "loras" not in record
    first, record = run(predictor, lora_weights=["style"])
    digest = hashlib.sha256((folder / "loras" / "style.safetensors").read_bytes()).hexdigest()
    assert record["loras"] == [{"name": "style", "sha256": digest, "scale": 1.0}]
    assert record["inputs"]["lora_weights"] == ["style"]
    half, record = run(predictor, lora_weights=["style"], lora_scales=[0.5])
    assert record["inputs"]["lora_scales"] == [0.5]
    again, _ = run(predictor, **record["inputs"])
    word, _ = run(predictor, prompt="a red sks", lora_weights=["style", "sks.safetensors"], lora_scales=[0.5])
    plain, _ = run(predictor, prompt="a red sks", lora_weights=["style"], lora_scales=[0.5])
    assert len({one.tobytes() for one in (base, first, half, word, plain)}) == 5
    assert np.array_equal(again, half)
    assert np.array_equal(run(predictor)[0], base)


@pytest.mark.slow
def test_turbo_is_the_distilled_weights_with_their_settings(predictor: Predictor, folder: Path) -> None:
    """Those of the fixture are random; what they do is exact. The next request has the model's own weights again."""
    inputs = {"steps_prior": None, "steps_decoder": None}
    exact, _ = run(predictor)
    turbo, record = run(predictor, **inputs, speed="turbo")
    digest = hashlib.sha256((folder / "turbo" / "turbo.safetensors").read_bytes()).hexdigest()
    assert record["loras"] == [{"name": "turbo", "sha256": digest, "scale": 1.0}]
    assert record["sampling"]["sampler"] == "ddim_cosine"
    assert {name: record["inputs"][name] for name in ("steps_prior", "steps_decoder", "guidance_scale_prior")} == {
        "steps_prior": 4,
        "steps_decoder": 3,
        "guidance_scale_prior": 1,
    }
    assert np.array_equal(run(predictor, **record["inputs"])[0], turbo)
    spelled = {"steps_prior": 4, "steps_decoder": 3, "guidance_scale_prior": 1, "guidance_scale_decoder": 1}
    same, _ = run(predictor, **spelled, sampler="ddim_cosine", lora_weights=["style"])
    assert np.array_equal(same, turbo)
    assert not np.array_equal(run(predictor, **spelled, sampler="ddim_cosine")[0], turbo)
    assert np.array_equal(run(predictor)[0], exact)


def test_embeddings_are_recorded(predictor: Predictor, folder: Path) -> None:
    """Those that a prompt names, by the bytes of the files that are there then."""
    file = folder / "embeddings" / "styles" / "ink.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(folder / "loras" / "sks.safetensors", file)
    prompts = {"prompt": "a cup, embedding:ink, embedding:none", "negative_prompt": "embedding:styles/ink.safetensors"}
    first, record = run(predictor, **prompts)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()]
    assert record["embeddings"] == [
        {"name": "ink", "sha256": digests[0]},
        {"name": "styles/ink.safetensors", "sha256": digests[0]},
    ]
    vectors = load_file(file)["clip_g"]
    save_file({"clip_g": -vectors}, file)
    second, record = run(predictor, **prompts)
    digests.append(hashlib.sha256(file.read_bytes()).hexdigest())
    assert {one["sha256"] for one in record["embeddings"]} == {digests[1]} != {digests[0]}
    assert not np.array_equal(first, second)
    assert "embeddings" not in run(predictor, prompt="an ink")[1]


def test_loras_are_fetched(predictor: Predictor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Site()) as site, contextlib.closing(Site()) as other:
        check_fetched(predictor, folder, site, other, monkeypatch)


def check_fetched(predictor: Predictor, folder: Path, site: Site, other: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, monkeypatch, "style.safetensors")
    content = (folder / "loras" / "style.safetensors").read_bytes()
    site.answers["/me/style/resolve/main/style.safetensors"] = content
    other.answers["/a/b.safetensors"] = content
    expected, _ = run(predictor, lora_weights=["style"])
    for text in ("me/style", f"{other.url}/a/b.safetensors?token=secret"):
        made, record = run(predictor, lora_weights=[text])
        assert np.array_equal(made, expected)
        assert "secret" not in str(record)
    count = len(site.asked)
    run(predictor, lora_weights=["me/style"])
    assert len(site.asked) == count


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"lora_weights": ["none"]},
            r"^lora_weights\[0\] is 'none', which is not among .*: it has broken, sks, style\.$",
        ),
        ({"lora_weights": ["../prior"]}, r"^lora_weights\[0\] is '\.\./prior'; it must be the name"),
        ({"lora_weights": ["style", "broken"]}, r"^lora_weights\[1\]: 'broken' is truncated or no safetensors file"),
        ({"lora_weights": ["style"], "lora_scales": [4]}, r"^lora_scales\[0\] is 4; it must be a number from -2 to 3"),
        ({"lora_weights": ["style"], "lora_scales": [1, 1]}, r"^lora_scales has 2 values; it must have 1"),
        ({"lora_scales": [1]}, "^lora_scales needs lora_weights, which is left out"),
        ({"lora_weights": ["style"] * 9}, "^lora_weights has 9 values; it may have at most 8"),
    ],
)
def test_wrong_loras(predictor: Predictor, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(predictor, **given)
