"""Predictions that take their time: at once, again, cancelled, and told of by webhooks."""

import numpy as np
import pytest

from tests.http.serving import SLOW, SMALL, Receiver, Server, picture


def test_one_at_a_time(server: Server) -> None:
    with server.busy("first") as started:
        assert (started.status_code, started.json()) == (202, {"id": "first", "status": "starting"})
        second = server.post(SMALL)
        assert second.status_code == 409
        assert "At capacity" in second.json()["error"]
        assert server.status() == "BUSY"
    server.predict(**SMALL)


def test_put_of_what_runs_already_starts_nothing(server: Server) -> None:
    with server.busy("mine"):
        again = server.put("mine", SLOW)
        assert again.status_code == 202
        assert again.json()["id"] == "mine"
        assert again.json()["status"] in ("starting", "processing")


def test_put_after_the_end_runs_again(server: Server) -> None:
    first = server.put("mine", SMALL).json()
    server.wait_until("READY")
    second = server.put("mine", SMALL).json()
    assert [first["status"], second["status"]] == ["succeeded", "succeeded"]
    assert first["metrics"]["seeds"] != second["metrics"]["seeds"]


def test_put_under_another_name_is_refused(server: Server) -> None:
    answer = server.put("mine", SMALL, id="yours")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "id"]


def test_cancel(server: Server, receiver: Receiver) -> None:
    hook = {"webhook": f"{receiver.url}/hook", "webhook_events_filter": ["completed"]}
    with server.busy("mine", **hook):
        answer = server.cancel("mine")
        assert (answer.status_code, answer.json()) == (200, {})
        server.wait_until("READY")
    (end,) = receiver.webhooks("/hook")
    assert (end["id"], end["status"]) == ("mine", "canceled")
    assert not end.get("output")
    assert list(server.temporary.glob("cascade-*/*")) == []
    assert server.cancel("mine").status_code == 404
    assert server.cancel("nobody's").status_code == 404
    server.predict(**SMALL)


def test_a_client_that_goes_away_cancels(server: Server, receiver: Receiver) -> None:
    server.abandon(webhook=f"{receiver.url}/hook", webhook_events_filter=["completed"])
    (end,) = receiver.webhooks("/hook")
    assert end["status"] == "canceled"
    assert not end.get("output")
    server.predict(**SMALL)


def test_webhooks_tell_of_every_stage(server: Server, receiver: Receiver) -> None:
    inputs = {**SMALL, "num_images": 2, "seed": 5}
    answer = server.post(inputs, {"Prefer": "respond-async"}, webhook=f"{receiver.url}/hook")
    assert answer.status_code == 202
    *before, end = receiver.webhooks("/hook")
    assert {state["id"] for state in [*before, end]} == {answer.json()["id"]}
    # Sent side by side, they may overtake one another.
    assert {state["status"] for state in before} <= {"starting", "processing"}
    # Cog sends one of output or logs in half a second at most, so that a quick prediction's output may come at the end only.
    outputs = [state["output"] for state in before if state.get("output")]
    assert all(output == end["output"][: len(output)] for output in outputs)
    assert "100%|" in end["logs"]
    assert end["status"] == "succeeded"
    assert end["metrics"]["seeds"] == [5, 6]
    assert [picture(output).size for output in end["output"]] == [(64, 64)] * 2


@pytest.mark.parametrize(
    ("events", "statuses"),
    [(["completed"], ["succeeded"]), (["start", "completed"], ["starting", "succeeded"])],
)
def test_webhooks_are_filtered(server: Server, receiver: Receiver, events: list[str], statuses: list[str]) -> None:
    hook = {"webhook": f"{receiver.url}/hook", "webhook_events_filter": events}
    synchronous = server.post({**SMALL, "seed": 1, "output_format": "png"}, **hook).json()
    told = receiver.webhooks("/hook")
    assert [state["status"].replace("processing", "starting") for state in told] == statuses
    one, other = (np.asarray(picture(state["output"][0])) for state in (synchronous, told[-1]))
    assert (one == other).all()
