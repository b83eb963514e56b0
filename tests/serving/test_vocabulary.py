"""The words that a model knows."""

import json
import logging
from pathlib import Path

import pytest

from miniature.icons import STYLES, load_objects
from miniature.prompts import make_prompts
from miniature.vocabulary import vocabulary
from serving.service import Service
from serving.settings import Settings
from serving.vocabulary import FILE, Vocabulary
from tests.conftest import MINI

NAMES = [item.name for item in load_objects()]
KNOWN = Vocabulary(
    ("red apple", "apple", "top hat", "jack-o'-lantern", "T-rex"), ("a", "on", "red", "background", "3d")
)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("", []),
        ("a Red Apple on a red background", []),
        ("a red top hat on a hat", ["hat"]),
        ("a jack-o'-lantern, a T-Rex, 3D", []),
        ("two apples, two pears", ["two", "apples", "pears"]),
        ("a (apple:1.3) on ((red)) background:0.5)", []),
        ("a embedding:style apple", []),
        ("ein Äpfel", ["ein", "äpfel"]),
        ("一只 apple", ["一只"]),
    ],
)
def test_unknown_words(prompt: str, unknown: list[str]) -> None:
    assert KNOWN.unknown(prompt) == unknown


def test_the_miniature_names_what_it_was_trained_on() -> None:
    written = json.loads((MINI / FILE).read_text("utf-8"))
    assert written == vocabulary(NAMES, STYLES)
    known = Vocabulary.of(MINI)
    assert [known.unknown(prompt.text) for prompt in make_prompts(NAMES, STYLES, 3)] == [[]] * 700


def test_a_model_need_not_name_its_words(tmp_path: Path) -> None:
    assert Vocabulary.of(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", '{"objects": []}', '{"objects": [], "words": [1]}'])
def test_a_damaged_file_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match="must be a JSON object with the lists of texts objects and words"):
        Vocabulary.of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("detail", ["full", "settings"])
def test_the_log_names_unknown_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, detail: str
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(MINI))
    monkeypatch.setenv("CASCADE_METADATA", detail)
    service = Service.load(Settings.from_environment())
    few = {"steps_prior": 1, "steps_decoder": 1}
    with caplog.at_level(logging.WARNING):
        service.predict({"prompt": "a red apple in a cathedral of glass", **few}, lambda *_: None)
        service.predict({"prompt": "a red apple on a green background", **few}, lambda *_: None)
    said = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
    full = "The prompt has words that the model does not know: cathedral, glass."
    assert said == [full if detail == "full" else "The prompt has 2 words that the model does not know."]
