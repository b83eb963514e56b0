"""LoRAs over HTTP, on the miniature with some that have learned nothing: of the model folder, and downloaded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.http.serving import Server
from tests.http.test_images import QUICK, made, refusal
from tests.serving.test_loras import Site

SIZE = QUICK["width"], QUICK["height"]


@pytest.fixture
def site(mini_with_controlnets: Path) -> Iterator[Site]:
    with contextlib.closing(Site()) as site:
        site.answers["/style.safetensors"] = (mini_with_controlnets / "loras" / "style.safetensors").read_bytes()
        yield site


def colours(pixels: bytes) -> np.ndarray:
    return np.asarray(Image.frombytes("RGB", SIZE, pixels)).astype(int)


def test_a_lora_changes_the_picture_and_leaves_no_trace(controlled: Server) -> None:
    base = made(controlled)
    whole = made(controlled, lora_weights=["style"])
    assert made(controlled) == base
    half = made(controlled, lora_weights=["style.safetensors"], lora_scales=[0.5])
    assert made(controlled, lora_weights=["style", "sks"], lora_scales=[1, 0]) == whole
    assert made(controlled, lora_weights=["style"], lora_scales=[0]) == base
    changes = [np.abs(colours(one) - colours(base)).mean() for one in (half, whole)]
    assert 1 < changes[0] < changes[1]
    with_word = made(controlled, prompt="a red sks", lora_weights=["sks"])
    assert with_word != made(controlled, prompt="a red sks")
    assert made(controlled) == base


def test_a_downloaded_one_makes_the_picture_of_the_same_file(controlled: Server, site: Site) -> None:
    base, expected = made(controlled), made(controlled, lora_weights=["style"])
    url = f"{site.url}/style.safetensors?token=secret"
    assert made(controlled, lora_weights=[url]) == expected
    assert made(controlled) == base
    assert made(controlled, lora_weights=[url]) == expected
    assert len(site.asked) == 1
    log = controlled.log.read_text()
    assert "style.safetensors" in log
    assert "secret" not in log


def test_what_cannot_be_used_gets_one_sentence(controlled: Server, site: Site) -> None:
    base = made(controlled)
    site.answers["/page.safetensors"] = b"<html>"
    host = site.url.removeprefix("http://")
    for text, sentence in {
        "none": "lora_weights[1] is 'none', which is not among the model folder's loras: it has sks, style.",
        f"{site.url}/gone.safetensors": f"lora_weights[1] could not be downloaded from {host}: "
        "the server answered 404 Not Found.",
        f"{site.url}/page.safetensors": f"lora_weights[1]: '{site.url}/page.safetensors' is truncated or no safetensors file",
    }.items():
        assert refusal(controlled, lora_weights=["style", text]).startswith(sentence)
        assert made(controlled) == base
