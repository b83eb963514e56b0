"""A1111's text, read by the rules of its own web UI and of Civitai."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.infotext import infotext
from serving.record import Lora, Origin, Record
from tests.metadata import read_as_a1111, read_as_civitai

VERSIONS = {"cascade": "0.1.0"}
INPUTS = {
    "prompt": "a red apple",
    "negative_prompt": "a leaf",
    "steps_prior": 20,
    "steps_decoder": 10,
    "guidance_scale_prior": 4.0,
    "guidance_scale_decoder": 1.1,
}


def text(model: dict[str, str] | None = None, loras: tuple[Lora, ...] = (), **changes: Any) -> str:
    model = model or {"name": "Stable Cascade", "sha256": "0123456789abcdef"}
    inputs = {name: value for name, value in {**INPUTS, **changes}.items() if value is not None}
    record = Record(inputs, (), "ddpm", Origin(model, {}, {}, VERSIONS), edited=False, loras=loras)
    return infotext(record.of_picture(1, 8, 1024, 768))


def test_the_text() -> None:
    assert text() == (
        "a red apple\n"
        "Negative prompt: a leaf\n"
        "Steps: 20, Sampler: DDPM, CFG scale: 4, Seed: 8, Size: 1024x768, Model hash: 0123456789, "
        "Model: Stable Cascade, Decoder steps: 10, Decoder CFG scale: 1.1, Version: Stable Cascade 0.1.0"
    )


def test_what_is_not_there_is_left_out() -> None:
    assert text(negative_prompt="").startswith("a red apple\nSteps: 20, ")
    assert text(prompt="").startswith("Negative prompt: a leaf\nSteps: 20, ")
    for empty in ("", None):
        assert text(prompt=empty, negative_prompt=empty).startswith("Steps: 20, ")
    assert "hash" not in text({"name": "Stable Cascade"})
    assert text(steps_prior=None) == ""


def test_image_to_image_has_a_strength() -> None:
    assert read_as_a1111(text(prompt_strength=0.3)).settings["Denoising strength"] == "0.3"


@pytest.mark.parametrize("name", ["Cascade, fine: tuned", 'My "best"', "two\nlines", "a\\b"])
def test_values_are_quoted(name: str) -> None:
    found = read_as_a1111(text({"name": name, "sha256": "0123456789abcdef"}))
    assert found.settings["Model"] == name
    assert (found.settings["Seed"], found.settings["Version"]) == ("8", "Stable Cascade 0.1.0")


def test_loras() -> None:
    loras = (Lora("ink", "a" * 64, 0.5), Lora("wool", "b" * 64, 1.0))
    assert read_as_a1111(text(loras=loras)).settings["Lora hashes"] == f"ink: {'a' * 12}, wool: {'b' * 12}"


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a cat\nNegative prompt: dogs", "a cat\nNegative prompt : dogs"),
        ("Steps: 3, Sampler: x, Seed: 1", "Steps : 3, Sampler: x, Seed: 1"),
        ("a stair\nSteps: up\nTemplate: none", "a stair\nSteps : up\nTemplate : none"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("nul \0, escape \x1b, next line \x85", "nul  , escape  , next line"),
        ("\ud83d alone", "\ufffd alone"),
        ("苹果🦊 تفاحة", "苹果🦊 تفاحة"),
        ("a: b, c: d, e: f", "a: b, c: d, e: f"),
        ('"quoted", \\(escaped\\), <lora:x:1>', '"quoted", \\(escaped\\), <lora:x:1>'),
    ],
)
def test_prompts_that_the_grammar_could_misunderstand(prompt: str, shown: str) -> None:
    for read in (read_as_a1111, read_as_civitai):
        found = read(text(prompt=prompt, negative_prompt=prompt))
        assert (found.prompt, found.negative, found.settings["Steps"]) == (shown, shown, "20")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=50), st.text(max_size=50))
def test_any_prompts_are_read(prompt: str, negative: str) -> None:
    written = text(prompt=prompt, negative_prompt=negative)
    assert "\0" not in written
    written.encode()
    for read in (read_as_a1111, read_as_civitai):
        found = read(written)
        assert found.settings["Seed"] == "8"
        assert bool(found.prompt) == bool(prompt.strip()) or not prompt.isprintable()
