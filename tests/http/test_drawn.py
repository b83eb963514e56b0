"""Requests of all kinds, one after the other in one server, with bad ones in between."""

from random import Random

import pytest

from tests.http.drawn import Model, bad_inputs, check, draw
from tests.http.serving import Server

SEED = 20_261_126
MODEL = Model(controls=("canny", "inpainting", "super_resolution"), largest=160, loras=("style", "sks"))


def test_drawn_requests(controlled: Server, pytestconfig: pytest.Config) -> None:
    random = Random(SEED)
    for i in range(300 if pytestconfig.getoption("--long") else 30):
        drawn = draw(random, MODEL)
        controlled.wait_until("READY")
        check(drawn, controlled.post(drawn.inputs).json(), MODEL)
        if i % 5 == 0:
            controlled.wait_until("READY")
            failed = controlled.post(bad_inputs(random)).json()
            assert failed["status"] == "failed", failed
            assert failed["error"].endswith(".")
