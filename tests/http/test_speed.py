"""`speed` and `sampler` over HTTP."""

import base64

from tests.http.serving import Server
from tests.metadata import read_record

SMALL = {"prompt": "a red apple", "width": 64, "height": 64, "seed": 7}


def test_the_log_and_the_record_say_what_a_speed_means(controlled: Server) -> None:
    """And the record's inputs make the same file again."""
    made = controlled.predict(**SMALL, speed="fast")
    assert made["status"] == "succeeded", made
    (said,) = [line for line in made["logs"].splitlines() if line.startswith("Speed ")]
    (output,) = made["output"]
    record = read_record(base64.b64decode(output.partition(",")[2]))
    inputs = record["inputs"]
    assert said.startswith(f"Speed fast: Stage C {inputs['steps_prior']} steps of {record['sampling']['sampler']} ")
    assert inputs["speed"] == "fast"
    assert inputs["steps_prior"] < 20
    assert inputs["steps_decoder"] < 10
    assert record["sampling"]["sampler"] == "ddim_cosine"
    assert controlled.predict(**inputs)["output"] == made["output"]
    exact = controlled.predict(**SMALL)
    assert exact["output"] != made["output"]
    assert "Speed " not in exact["logs"]


def test_what_is_given_overrides_a_speed(server: Server) -> None:
    own = {"steps_prior": 3, "steps_decoder": 2, "sampler": "ddpm"}
    said = server.predict(**SMALL, **own, speed="fast")["logs"]
    assert "Speed fast: Stage C 3 steps of ddpm with guidance 4" in said
    assert "Stage B 2 steps of ddpm without guidance" in said


def test_turbo_without_distilled_weights_is_one_sentence(cautious: Server) -> None:
    made = cautious.post({**SMALL, "speed": "turbo"}).json()
    assert made["status"] == "failed"
    assert "InputError: speed is 'turbo', which needs distilled weights in the model folder" in made["error"]
