"""The nginx configuration of docs/operations.md, run as it stands there, but for ports, before Cog's server itself."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.http.serving import ANSWER, ROOT, SMALL, Receiver, Server, data_url, free_port, wait_for
from tests.http.test_front import BAD
from tests.readme import block

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
TOKEN = {"Authorization": "Bearer CHANGE-ME"}

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

# What a system's own nginx.conf says around it.
AROUND = """
daemon off;
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {block}
}}
"""


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[str]:
    """nginx before Cog's server, past the front; gives its URL."""
    port = free_port()
    code = block(ROOT / "docs" / "operations.md", "nginx", "server {")
    assert "listen 8080;" in code
    code = code.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    code = code.replace("127.0.0.1:5000", f"127.0.0.1:{server.worker().environ()['PORT']}")
    user = "user root;" if os.getuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(AROUND.format(user=user, folder=tmp_path, block=code))
    process = subprocess.Popen([NGINX, "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-e", tmp_path / "error.log"])
    try:

        def listens() -> bool:
            assert process.poll() is None, (tmp_path / "error.log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(listens, ANSWER, "nginx")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(ANSWER)


def put(proxy: str, path: str, **body: object) -> requests.Response:
    """With the path as it is given: requests would normalize it."""
    request = requests.Request("PUT", proxy, json={"input": SMALL, **body}, headers=TOKEN).prepare()
    request.url = proxy + path
    with requests.Session() as session:
        return session.send(request, timeout=ANSWER)


def test_predictions(proxy: str, server: Server, receiver: Receiver) -> None:
    posted = requests.post(f"{proxy}/predictions", json={"input": SMALL}, headers=TOKEN, timeout=ANSWER).json()
    assert posted["status"] == "succeeded"
    assert len(posted["id"]) == 32
    server.wait_until("READY")
    assert put(proxy, "/predictions/mine").json()["id"] == "mine"
    server.wait_until("READY")
    large = {**SMALL, "image": data_url(b"x" * 8_000_000)}
    answer = requests.post(f"{proxy}/predictions", json={"input": large}, headers=TOKEN, timeout=ANSWER)
    assert "is not a picture" in answer.json()["error"]
    assert requests.get(f"{proxy}/health-check", timeout=ANSWER).json()["status"] in ("READY", "BUSY")
    assert requests.get(f"{proxy}/openapi.json", timeout=ANSWER).status_code == 200
    hook = {"webhook": f"{receiver.url}/hook", "webhook_events_filter": ["completed"]}
    with server.busy("slow", **hook):
        assert requests.post(f"{proxy}/predictions/slow/cancel", headers=TOKEN, timeout=ANSWER).status_code == 200
        assert receiver.webhooks("/hook")[-1]["status"] == "canceled"


def test_what_is_closed(proxy: str, server: Server) -> None:
    server.wait_until("READY")
    for method, path in (("POST", "/predictions"), ("PUT", "/predictions/a"), ("POST", "/predictions/a/cancel")):
        assert requests.request(method, proxy + path, json={"input": SMALL}, timeout=ANSWER).status_code == 401
    for method, path in (("POST", "/shutdown"), ("POST", "/trainings"), ("PUT", "/trainings/a"), ("GET", "/")):
        assert requests.request(method, proxy + path, json={}, headers=TOKEN, timeout=ANSWER).status_code == 404
    assert requests.get(f"{proxy}/predictions", headers=TOKEN, timeout=ANSWER).status_code == 403
    too_large = requests.post(f"{proxy}/predictions", data=b" " * (101 * 2**20), headers=TOKEN, timeout=ANSWER)
    assert too_large.status_code == 413
    server.predict(**SMALL)


def test_ids_that_would_end_the_service(proxy: str, server: Server) -> None:
    server.wait_until("READY")
    for identifier in BAD:
        answer = requests.post(
            f"{proxy}/predictions", json={"id": identifier, "input": SMALL}, headers=TOKEN, timeout=ANSWER
        )
        assert answer.status_code == 422
        assert put(proxy, "/predictions/mine", id=identifier).status_code == 422
    for path in ("a" * 256, "a%00b", "..%2f..%2fx", "%2e%2e", "..", "/tmp/x", "a%2fb", "%2F%2e%2e%2Fa%2F%2Fb"):
        assert put(proxy, f"/predictions/{path}").status_code in (400, 404), path
    # What nginx reads as an allowed id is all that Cog gets, not the path that was sent.
    for path in ("/predictions/%2Ftmp", "/x/../predictions/%2Ftmp", "//predictions//tmp", "/predictions/./tm%70"):
        server.wait_until("READY")
        assert put(proxy, path).json()["id"] == "tmp", path
    server.predict(**SMALL)
