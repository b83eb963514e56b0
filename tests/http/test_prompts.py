"""Weighted and long prompts over HTTP."""

from typing import Any

import pytest

from tests.http.serving import Server, picture
from tests.http.test_images import refusal

QUICK = {"width": 64, "height": 64, "steps_prior": 1, "steps_decoder": 1, "seed": 1, "output_format": "png"}


def made(server: Server, **inputs: Any) -> bytes:
    prediction = server.predict(**QUICK, **inputs)
    assert prediction["status"] == "succeeded", prediction.get("error")
    (output,) = prediction["output"]
    return picture(output).tobytes()


def test_brackets_are_weights_if_asked_for(server: Server) -> None:
    plain = made(server, prompt="a red apple")
    assert made(server, prompt="a (red:1) apple", prompt_weighting=True) == plain
    assert made(server, prompt="a (red:1.5) apple", prompt_weighting=True) != plain
    assert made(server, prompt="a (red:1.5) apple") != made(server, prompt="a (red:1.5) apple", prompt_weighting=True)


def test_words_after_75_tokens_count(server: Server) -> None:
    words = "a red apple on a green background, " * 10
    assert made(server, prompt=words + "an ant") != made(server, prompt=words + "a bus")


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"prompt": "a (cat:9)"}, "prompt has the weight 9 at character 2, in '(cat:9)'; a weight must lie between"),
        ({"negative_prompt": "(rain:nan)"}, "negative_prompt has the weight not a number at character 0, in "),
        (
            {"prompt": "embedding:style"},
            "prompt names the embedding 'style', which this model does not have: it has none.",
        ),
    ],
)
def test_what_cannot_be_weighted_gets_one_sentence(server: Server, inputs: dict[str, Any], sentence: str) -> None:
    assert refusal(server, **inputs, prompt_weighting=True).startswith(sentence)
    assert made(server, **inputs)  # as text
