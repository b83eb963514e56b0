"""Requests of all kinds, one after the other in one server, with bad ones in between."""

from random import Random

import pytest

from tests.http.drawn import Model, bad_inputs, check, draw
from tests.http.serving import Server

SEED = 20_261_126
MODEL = Model(largest=160)


def test_drawn_requests(server: Server, pytestconfig: pytest.Config) -> None:
    random = Random(SEED)
    for i in range(300 if pytestconfig.getoption("--long") else 30):
        drawn = draw(random, MODEL)
        server.wait_until("READY")
        check(drawn, server.post(drawn.inputs).json(), MODEL)
        if i % 5 == 0:
            server.wait_until("READY")
            failed = server.post(bad_inputs(random)).json()
            assert failed["status"] == "failed", failed
            assert failed["error"].endswith(".")
