"""scripts/self-test: a report of the miniature, and each check on pictures that must fail it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade.pipeline import Cascade
from cascade.request import Request
from scripts.self_test import PROMPTS, Trial, main, problems_between, problems_of


def trial(image: Image.Image, name: str = "a picture") -> Trial:
    return Trial(name, image, 1.0, 10**9)


def gradient(start: int, stop: int) -> Image.Image:
    return Image.fromarray(np.linspace(start, stop, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))


@pytest.mark.slow
def test_of_the_miniature(quick_mini: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(quick_mini), "-o", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "self-test.txt").read_text("utf-8")
    assert text in capsys.readouterr().out
    for line in (*map(repr, PROMPTS), "sampler ddim: ", "sampler lcm: ", "Model: mini", "Device: ", "torch "):
        assert line in text
    assert text.endswith("All checks passed.\n")
    assert Image.open(tmp_path / "report" / "self-test.png").size > (1000, 500)


@pytest.mark.slow
def test_a_model_that_ignores_the_prompt_fails(
    quick_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = Cascade.generate
    same = generate(Cascade.load(quick_mini, "cpu"), Request(PROMPTS[0]))
    monkeypatch.setattr(Cascade, "generate", lambda *_: same)
    assert main(["--weights", str(quick_mini), "-o", str(tmp_path)]) == 1
    assert f"Failed: {PROMPTS[0]!r} and {PROMPTS[1]!r} differ by 0.0 of 255" in capsys.readouterr().out


def test_noise_fails() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (problem,) = problems_of(trial(Image.fromarray(noise)))
    assert problem.startswith("a picture: neighbours correlate by ")


@pytest.mark.parametrize("colour", ["black", "white", "red"])
def test_saturated_pictures_fail(colour: str) -> None:
    (problem,) = problems_of(trial(Image.new("RGB", (64, 64), colour)))
    assert problem == "a picture: 100% of the values are 0 or 255; at most 98% are expected."


def test_a_picture_of_one_grey_fails() -> None:
    assert list(problems_of(trial(Image.new("RGB", (64, 64), "grey"))))


def test_pictures_of_things_pass() -> None:
    dark, bright = trial(gradient(10, 90)), trial(gradient(90, 200))
    assert list(problems_of(dark)) == list(problems_of(bright)) == list(problems_between([dark, bright])) == []


def test_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(tmp_path), "-o", str(tmp_path / "report")]) == 1
    assert "model.json" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
