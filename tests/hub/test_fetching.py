"""CASCADE_DOWNLOAD: a start that fetches its weights, with huggingface_hub's real client, from a local Hub."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from serving.fetching import parts_named
from tests.hub.conftest import Script
from tests.hub.serving import Break, Hub

Run = Callable[..., str]

# The smallest request: one picture of 64x64, one step a stage.
REQUEST = [f"-i{given}" for given in ("steps_prior=1", "steps_decoder=1", "width=64", "height=64", "seed=1")]
VQGAN = "vqgan/diffusion_pytorch_model.bf16.safetensors"


def test_half_a_download_is_not_loaded_and_goes_on(hub: Hub, tmp_path: Path, start: Script, succeed: Run) -> None:
    folder, picture = tmp_path / "volume" / "model", tmp_path / "out.png"
    variables = {"CASCADE_DOWNLOAD": "lite", "CASCADE_WEIGHTS": str(folder)}
    arguments = [*REQUEST, "-o", picture]

    hub.breaks[VQGAN] = [Break(0, reset=True)]  # each time
    process = start("predict", *arguments, **variables)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("CASCADE_DOWNLOAD: The connection to ")
    assert not folder.exists()
    assert not picture.exists()

    hub.breaks.clear()
    hub.seen.clear()
    said = succeed("predict", *arguments, **variables)
    assert [path.rpartition("/")[2] for path in hub.fetched() if path.endswith(".safetensors")] == [
        VQGAN.rpartition("/")[2]
    ]
    assert re.search(r"Fetched [\d.]+ MB in [\d.]+ s, \d+ MB/s\.", said)
    assert Image.open(picture).size == (64, 64)
    assert not (folder.parent / ".download" / "download.json").exists()

    hub.seen.clear()
    said = succeed("predict", *arguments, **variables)
    assert f"CASCADE_DOWNLOAD: {folder} has all of it." in said
    assert hub.seen == []


@pytest.mark.parametrize("text", ["half", "full,everything", "safety", "full, lite"])
def test_unknown_words_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"CASCADE_DOWNLOAD is {text!r}; it must be full or lite, which")):
        parts_named(text)


def test_named_parts() -> None:
    assert parts_named("lite, previewer, safety") == [
        "tokenizer",
        "text_encoder",
        "prior_lite",
        "decoder_lite",
        "vqgan",
        "previewer",
        "safety_checker",
    ]
