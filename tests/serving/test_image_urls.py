"""Inputs that are URLs become files, within limits; what fails is one sentence, and stops the rest."""

import threading
from pathlib import Path
from typing import Any

import pytest

from cascade.limits import InputError
from serving.download import Limits
from serving.image_urls import UrlSettings, downloaded
from tests.serving.web import Web, picture

SETTINGS = UrlSettings(Limits(size=1_000_000))


def fetch(inputs: dict[str, Any]) -> None:
    with downloaded(inputs, list(inputs), SETTINGS):
        pass


def test_urls_become_files(web: Web, tmp_path: Path) -> None:
    own = tmp_path / "own.png"
    own.write_bytes(b"own")
    images = (f"{web.url}/picture", "data:,hi%20there", "DATA:,hi", own)
    inputs = {"image": own, "mask": "alpha", "images": images, "none": None, "empty": (), "prompt": web.url}
    with downloaded(inputs, set(inputs) - {"prompt"}, SETTINGS) as made:
        assert [file.read_bytes() for file in made["images"]] == [picture(), b"hi there", b"hi", b"own"]
    assert {**made, "images": images} == inputs
    assert [file.exists() for file in made["images"]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"image": "data:no comma"}, "image is a data URL that cannot be decoded."),
        (
            {"images": ("data:,", "http://[::1/?secret")},
            "images[1] could not be downloaded from its URL: it is, or redirects to, something",
        ),
        (
            {"image": "http://user:word@x.invalid:80/?secret"},
            "image could not be downloaded from x.invalid: its host cannot be resolved.",
        ),
    ],
)
def test_sentences(inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=r"^.*\.$") as error:
        fetch(inputs)
    assert str(error.value).startswith(sentence)
    for secret in ("secret", "word"):
        assert secret not in str(error.value)


def test_one_failure_ends_the_others(web: Web) -> None:
    with pytest.raises(InputError, match=r"^images\[1\] could not"):
        fetch({"images": (f"{web.url}/slow-body", f"{web.url}/status?code=404")})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CASCADE_PUBLIC_URLS_ONLY", "CASCADE_URL_SECONDS", "CASCADE_URL_MEGABYTES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert UrlSettings.from_environment() == UrlSettings(Limits(60, 60, 100_000_000), public_only=False)
    for name, value in zip(names, ("1", "2.5", "0.5"), strict=True):
        monkeypatch.setenv(name, value)
    assert UrlSettings.from_environment() == UrlSettings(Limits(2.5, 2.5, 500_000), public_only=True)
    for name, value in (("CASCADE_PUBLIC_URLS_ONLY", "yes"), *((name, "-1") for name in names), (names[1], "nan")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            with pytest.raises(ValueError, match=f"^{name} is '{value}'; it must be "):
                UrlSettings.from_environment()
