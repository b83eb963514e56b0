"""Image URLs through Cog's server: who downloads, what a failure leaves behind, how fast an end is heard."""

import itertools
import os
import time
from pathlib import Path

import pytest
import requests

from tests.http.serving import ANSWER, SMALL, SOON, Receiver, Server, data_url, picture, wait_for
from tests.serving import web as hosts
from tests.serving.web import Web


def test_urls_files_and_data_are_the_same_picture(server: Server, web: Web) -> None:
    """Cog's own download would name itself by another user agent. Inputs are gone once the pictures are made."""
    content = hosts.picture()
    urls = [f"{web.url}/picture?token=secret", data_url(content), data_url(content).replace("data", "DATA", 1)]
    made = [
        server.predict(**SMALL, seed=1, image=url, image_prompts=[url, url], prompt_strength=0.5)["output"][0]
        for url in urls
    ]
    assert len(set(made)) == 1
    assert picture(made[0]).size == (64, 64)
    assert {headers["User-Agent"].partition("/")[0] for headers in web.headers} == {"python-httpx"}
    assert "secret" not in server.log.read_text()
    assert server.files() == []


def test_failed_downloads_leave_nothing(server: Server, web: Web) -> None:
    """20 requests: of one URL or of several of which one fails, once the others have arrived or before."""
    good, gone, endless = f"{web.url}/picture", f"{web.url}/status?code=404&secret=secret", f"{web.url}/endless"
    host = web.url.removeprefix("http://")
    cases = [
        ({"image": gone}, f"image could not be downloaded from {host}: the server answered 404 Not Found."),
        (
            {"image": good, "mask": data_url(hosts.picture()), "image_prompts": [good, gone, good, good]},
            f"image_prompts[1] could not be downloaded from {host}: the server answered 404 Not Found.",
        ),
        ({"image": good, "mask": endless}, f"mask could not be downloaded from {host}: it is larger than 100 MB."),
        ({"image": good, "mask": "data:image/png;base64,A"}, "mask is a data URL that cannot be decoded."),
        (
            {"image": good, "image_prompts": [good, "/etc/passwd"]},
            "image_prompts[1] is '/etc/passwd'; it must be an http, https or data URL of a picture.",
        ),
    ]
    for inputs, sentence in itertools.islice(itertools.cycle(cases), 20):
        assert server.error(**inputs) == sentence
        assert server.files() == []
    assert web.sent < 150e6
    assert "secret" not in server.log.read_text()


def test_more_pictures_than_allowed_are_not_downloaded(server: Server, web: Web) -> None:
    assert "9" in server.error(image_prompts=[f"{web.url}/picture"] * 9)
    assert not web.asked


def test_a_prompt_that_is_a_url_is_a_prompt(server: Server, web: Web) -> None:
    server.predict(**SMALL, prompt=f"{web.url}/picture")
    assert not web.asked


def test_cancel_and_a_client_that_goes_are_heard_while_downloading(
    server: Server, web: Web, receiver: Receiver
) -> None:
    inputs = {**SMALL, "image": f"{web.url}/slow-body", "image_prompts": [f"{web.url}/silent"]}
    hook = {"webhook": f"{receiver.url}/hook", "webhook_events_filter": ["completed"]}
    server.put("mine", inputs, {"Prefer": "respond-async"}, **hook)
    wait_for(lambda: web.asked.total() == 2, ANSWER, "the downloads' beginning")
    start = time.monotonic()
    assert server.cancel("mine").status_code == 200
    (end,) = receiver.webhooks("/hook")
    assert end["status"] == "canceled"
    server.wait_until("READY")
    assert time.monotonic() - start < SOON
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{server.url}/predictions", json={"input": inputs}, timeout=1)
    start = time.monotonic()
    server.wait_until("READY")
    assert time.monotonic() - start < SOON
    assert server.files() == []


def test_public_addresses_only(cautious: Server, web: Web) -> None:
    for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]"):
        for port in (web.server_port, 9):
            assert cautious.error(image=f"http://{host}:{port}/picture") == (
                f"image could not be downloaded from {host}:{port}: its host has no public address."
            )
    assert not web.asked
    cautious.predict(**SMALL, image=data_url(hosts.picture()))


def test_cogs_empty_folders_are_removed(server: Server) -> None:
    """Those of a minute ago; and what they were made for works without them."""
    folders = Path("/tmp/coglet/predictions")
    server.wait_until("READY")
    name = f"old-{time.time_ns()}"
    assert server.put(name, SMALL).json()["status"] == "succeeded"
    assert sorted(path.name for path in (folders / name).iterdir()) == ["inputs", "outputs"]
    old = time.time() - 61
    os.utime(folders / name, (old, old))
    server.wait_until("READY")
    again = server.put(name, {**SMALL, "output_format": "png", "width": 512, "height": 512, "num_images": 4}).json()
    assert again["status"] == "succeeded"
    assert [picture(output).size for output in again["output"]] == [(512, 512)] * 4
    assert not (folders / name).exists()
