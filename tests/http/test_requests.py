"""What the server answers to one request: to good ones, to bad ones, to those that look good and are not."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import requests

from scripts.openapi import add_training, make_schema
from tests.http.serving import ANSWER, ROOT, SMALL, Server, picture

INPUTS = make_schema((ROOT / "predict.py").read_text())["components"]["schemas"]["Input"]["properties"]
WRONG_KINDS = {"string": 5, "integer": "20", "number": "4", "boolean": "true", "array": 5, None: 5}


def bad_values() -> list[tuple[str, Any]]:
    """For every input a value of a wrong kind, null, and one beyond each end of its range."""
    bad = []
    for name, field in INPUTS.items():
        bad += [(name, WRONG_KINDS[field.get("type")]), (name, None)]
        bad += [(name, field.get("minimum", 0) + 0.5)] if field.get("type") == "integer" else []
        bad += [(name, "none of them")] if "allOf" in field else []
        bad += [(name, field["minimum"] - 1)] if "minimum" in field else []
        bad += [(name, field["maximum"] + 1)] if "maximum" in field else []
    return bad


def test_discovery_and_schema(server: Server) -> None:
    root = requests.get(server.url, timeout=ANSWER).json()
    assert root["cog_version"] == "0.23.1"
    document = requests.get(server.url + root["openapi_url"], timeout=ANSWER).json()
    expected = make_schema((ROOT / "predict.py").read_text())
    add_training(expected, (ROOT / "train.py").read_text(), "train")
    assert document == expected


def test_a_prediction(server: Server) -> None:
    prediction = server.predict(
        prompt="a blue square", width=100, height=72, num_images=2, steps_prior=2, steps_decoder=1, seed=7
    )
    assert set(prediction) >= {"id", "status", "output", "logs", "metrics"}
    pictures = [picture(output) for output in prediction["output"]]
    assert [(image.format, image.size) for image in pictures] == [("WEBP", (100, 72))] * 2
    metrics = prediction["metrics"]
    assert metrics["predict_time"] > 0
    assert metrics["seeds"] == [7, 8]
    assert "7" in prediction["logs"]
    assert "100%|" in prediction["logs"]


@pytest.mark.parametrize("body", [{}, {"input": {}}])
def test_every_input_may_be_left_out(server: Server, body: dict[str, Any]) -> None:
    prediction = server.send(body).json()
    assert prediction["status"] == "succeeded"
    (output,) = prediction["output"]
    assert picture(output).size == (256, 256)


@pytest.mark.parametrize(("output_format", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_formats(server: Server, output_format: str, kind: str) -> None:
    (output,) = server.predict(**SMALL, output_format=output_format)["output"]
    assert picture(output).format == kind


@pytest.mark.parametrize("prompt", ["naïve 🦊 \0 \u202e", "word " * 1_900])
def test_any_text_is_a_prompt(server: Server, prompt: str) -> None:
    """It makes a picture of its own, and of what the encoder does not read, the log has the beginning."""
    prediction, empty = (server.predict(**SMALL, seed=3, prompt=text) for text in (prompt, ""))
    made, other = (np.asarray(picture(one["output"][0])).astype(int) for one in (prediction, empty))
    assert abs(made - other).mean() > 0.5
    assert ("left out" in prediction["logs"]) == (len(prompt) > 1000)


@pytest.mark.parametrize(("name", "value"), bad_values())
def test_a_bad_value_is_422_and_names_the_input(server: Server, name: str, value: Any) -> None:
    answer = server.post({**SMALL, name: value})
    assert answer.status_code == 422, answer.text
    problems = answer.json()["detail"]
    assert {tuple(problem["loc"]) for problem in problems} == {("body", "input", name)}
    assert all(problem["msg"] and problem["type"] for problem in problems)


def test_every_bad_value_is_named(server: Server) -> None:
    answer = server.post({**SMALL, "seed": "one", "width": 63, "output_format": "gif"})
    assert answer.status_code == 422
    said = {problem["loc"][-1]: problem["msg"] for problem in answer.json()["detail"]}
    assert said == {
        "output_format": '"gif" is not one of ["webp","jpg","png"]',
        "seed": '"one" is not of type "integer"',
        "width": "63 is less than the minimum of 64",
    }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 400),
        ("{", 400),
        ('{"input": {"prompt": "\\ud800"}}', 400),
        ("[]", 422),
        ("null", 422),
        ('{"input": []}', 422),
        ('{"input": "prompt"}', 422),
        ('{"id": 5}', 422),
        ('{"input": {}, "webhook": "http://127.0.0.1", "webhook_events_filter": ["end"]}', 422),
    ],
)
def test_bodies_that_are_no_request(server: Server, body: str, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/predictions", data=body, headers=headers, timeout=ANSWER)
    assert answer.status_code == status, answer.text
    assert answer.text


def test_an_unknown_input_is_ignored(server: Server) -> None:
    (known,) = server.predict(**SMALL, seed=3)["output"]
    (unknown,) = server.predict(**SMALL, seed=3, num_outputs=2)["output"]
    assert (np.asarray(picture(unknown)) == np.asarray(picture(known))).all()


def test_whole_floats_are_whole_numbers_and_whole_numbers_floats(server: Server) -> None:
    whole = {"width": 64, "height": 72, "num_images": 2, "steps_prior": 2, "steps_decoder": 1, "seed": 9}
    scale = {"guidance_scale_prior": 4, "guidance_scale_decoder": 2, "output_quality": 60}
    ints = server.predict(prompt="a", **whole, **scale)
    floats = server.predict(prompt="a", **{name: float(value) for name, value in {**whole, **scale}.items()})
    assert floats["metrics"]["seeds"] == ints["metrics"]["seeds"] == [9, 10]
    for one, other in zip(ints["output"], floats["output"], strict=True):
        assert (np.asarray(picture(one)) == np.asarray(picture(other))).all()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64 - 1, -(2**63), 1e15, 1e23, 10**23])
def test_any_whole_number_is_a_seed(server: Server, seed: float) -> None:
    """As it was in the old container. 32 bits of it count; above 64 bits, JSON's numbers arrive as floats."""
    used = (seed if -(2**63) <= seed < 2**64 else int(float(seed))) % 2**32
    assert server.predict(**SMALL, seed=seed)["metrics"]["seeds"] == [used]


def test_seeds_are_reported_and_make_the_same_picture_again(server: Server) -> None:
    drawn = server.predict(**SMALL)
    (seed,) = drawn["metrics"]["seeds"]
    again = server.predict(**SMALL, seed=seed)
    assert (np.asarray(picture(drawn["output"][0])) == np.asarray(picture(again["output"][0]))).all()
    assert server.predict(**SMALL, seed=0)["metrics"]["seeds"] == [0]
    assert server.predict(**SMALL)["metrics"]["seeds"] != [seed]


def test_a_run_that_fails_says_why_and_the_next_one_works(server: Server) -> None:
    server.predict(**SMALL)
    server.wait_until("READY")
    shutil.rmtree(server.temporary)
    server.wait_until("UNHEALTHY")
    answer = server.post(SMALL)
    server.temporary.mkdir()
    assert answer.status_code == 200
    failed = answer.json()
    assert failed["status"] == "failed"
    assert str(server.temporary) in failed["error"]
    assert "Traceback" not in failed["error"]
    assert "output" not in failed
    server.predict(**SMALL)


def test_no_event_stream(server: Server) -> None:
    answer = server.post(SMALL, {"Accept": "text/event-stream"})
    assert answer.status_code == 406
    assert json.loads(answer.text)["error"]


def test_predictions_are_not_kept(server: Server) -> None:
    prediction = server.predict(**SMALL)
    answer = requests.get(f"{server.url}/predictions/{prediction['id']}", timeout=ANSWER)
    assert answer.status_code == 405
