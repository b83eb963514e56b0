"""What stands in the place of Cog's own download; tests/http/test_image_urls.py has the rest, through Cog's server."""

import threading
from pathlib import Path
from typing import Any

import cog
import pytest
from cog import BaseRunner, Input

from serving import cog_files
from serving.cog_files import with_files
from serving.download import Limits
from serving.image_urls import UrlSettings
from tests.serving.web import Web, picture


class Runner(BaseRunner):
    """Notes what it is called with."""

    def run(
        self,
        prompt: str = Input(description="Text.", default="none"),
        image: cog.Path | None = Input(description="A picture.", default=None),
        images: list[cog.Path] | None = Input(description="Pictures.", default=None),
    ) -> list[cog.Path]:
        self.contents = [path.read_bytes() for path in [image, *(images or [])] if path is not None]
        self.given = {"prompt": prompt, "image": image, "images": images}
        return []


@pytest.fixture
def runner() -> Runner:
    runner = Runner()
    runner.run = with_files(runner.run, UrlSettings(Limits(size=1_000_000)), most=4)  # type: ignore[method-assign]
    return runner


def test_the_version_that_this_was_read_in() -> None:
    """With another: read again who downloads, when `run`'s annotations are read, and which folders are made."""
    assert cog.__version__ == "0.23.1"


def test_urls_become_files_while_it_runs(runner: Runner, web: Web, tmp_path: Path) -> None:
    own = cog.Path(tmp_path / "own.png")
    own.write_bytes(b"own")
    runner.run(prompt=web.url, image=own, images=[f"{web.url}/picture", "data:,hi%20there", own])
    assert runner.contents == [b"own", picture(), b"hi there", b"own"]
    assert all(type(path) is cog.Path for path in [runner.given["image"], *runner.given["images"]])
    assert runner.given["prompt"] == web.url
    assert not runner.given["images"][0].exists()
    assert own.exists()


def test_what_is_left_out_stays_so(runner: Runner) -> None:
    runner.run(image=None, images=[], prompt="a")
    assert runner.given == {"prompt": "a", "image": None, "images": []}


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"image": "data:no comma"}, "image is a data URL that cannot be decoded."),
        (
            {"image": "http://[::1/?secret"},
            "image could not be downloaded from its URL: it is, or redirects to, something",
        ),
        (
            {"image": "http://user:word@x.invalid:80/?secret"},
            "image could not be downloaded from x.invalid: its host cannot be resolved.",
        ),
    ],
)
def test_sentences(runner: Runner, inputs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^.*\.$") as error:
        runner.run(**inputs)
    assert str(error.value).startswith(sentence)
    for secret in ("secret", "word"):
        assert secret not in str(error.value)


def test_what_is_no_url_is_left_to_run(runner: Runner, web: Web) -> None:
    """Which says what it takes: Cog does the same."""
    for value in ("file", "", "/etc/passwd", "file:///etc/passwd", "httpx://a", "h:", 5):
        with pytest.raises(AttributeError):  # of this test's run, which takes it for a file
            runner.run(image=value, images=[f"{web.url}/picture"])


def test_a_list_that_is_too_long_is_left_to_run(runner: Runner, web: Web) -> None:
    urls = [f"{web.url}/picture"] * 5
    with pytest.raises(AttributeError):  # of this test's run, which takes them for files
        runner.run(images=urls)
    assert not web.asked


def test_one_failure_ends_the_others(runner: Runner, web: Web) -> None:
    with pytest.raises(ValueError, match=r"^images\[1\] could not be downloaded"):
        runner.run(images=[f"{web.url}/slow-body", f"{web.url}/status?code=404"])
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


def test_only_empty_and_old_folders_of_cog_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog_files, "COG_FOLDERS", tmp_path)
    for name in ("empty", "full"):
        for part in ("inputs", "outputs"):
            (tmp_path / name / part).mkdir(parents=True)
    (tmp_path / "full" / "outputs" / "file").touch()
    cog_files.sweep()
    assert (tmp_path / "empty" / "inputs").exists()
    monkeypatch.setattr(cog_files, "SWEEP_AFTER", -1)
    cog_files.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "outputs" / "file").exists()
