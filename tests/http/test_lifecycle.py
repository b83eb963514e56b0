"""The server from its start to its end, with other weights, and with a place to put pictures."""

import io
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from PIL import Image

from tests.http.serving import ANSWER, MINI, ROOT, SLOW, SMALL, SOON, Receiver, Server, wait_for
from tests.serving.web import Web

# Grace for the worker; a server that has to be killed takes for ever.
END = 300


def healthcheck(server: Server, *options: str) -> tuple[int, str]:
    """The exit code and the words of scripts/healthcheck, run by a Python that has no packages."""
    command = [sys.executable, "-I", "-S", ROOT / "scripts" / "healthcheck", *options]
    variables = {"PORT": str(server.port), "TMPDIR": str(server.temporary)}
    ended = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=ANSWER)
    assert ended.stderr == ""
    return ended.returncode, ended.stdout


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers = []

    def start_one(*options: str, **more: Any) -> Server:
        servers.append(Server(tmp_path, *options, **more))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def test_from_start_to_sigterm(start: Callable[..., Server], web: Web) -> None:
    """With limits of downloads as an operator sets them; SIGTERM comes while a client waits for a download."""
    server = start(CASCADE_URL_SECONDS="2.5", CASCADE_URL_MEGABYTES="0.5")
    assert server.wait_until("STARTING", "READY") == "STARTING"
    assert (healthcheck(server), healthcheck(server, "--ready")) == ((0, ""), (1, "The server is STARTING.\n"))
    early = server.post(SMALL)
    assert early.status_code == 503
    assert server.wait_until("READY", "SETUP_FAILED") == "READY"
    assert healthcheck(server, "--ready") == (0, "")
    setup = server.health()["setup"]
    assert setup["status"] == "succeeded"
    assert set(setup) >= {"started_at", "completed_at", "logs"}
    for said in (str(MINI), "cpu", "float32", "GB", " s."):
        assert said in setup["logs"]
    assert server.health()["version"]["coglet"] == "0.23.1"
    worker = server.worker()
    environment = yaml.safe_load((ROOT / "cog.yaml").read_text())["environment"]
    assert {f"{name}={value}" for name, value in worker.environ().items()} >= set(environment)
    assert Path(worker.cmdline()[0]).name == "python"
    assert worker.environ()["PATH"].startswith(f"{Path(sys.executable).parent}:")
    server.predict(**SMALL)
    assert list(server.temporary.glob("cascade-*/*"))
    host = web.url.removeprefix("http://")
    assert server.error(image=f"{web.url}/endless") == (
        f"image could not be downloaded from {host}: it is larger than 0.5 MB."
    )
    assert server.error(image=f"{web.url}/drip", mask=f"{web.url}/picture") == (
        f"image could not be downloaded from {host}: it took longer than 2.5 seconds."
    )
    assert server.files() == []
    answers: list[requests.Response] = []
    slow = {**SMALL, "image": f"{web.url}/slow-body"}
    server.wait_until("READY")
    client = threading.Thread(target=lambda: answers.append(server.post(slow)))
    client.start()
    wait_for(lambda: web.asked["/slow-body"], ANSWER, "the download's beginning")
    began = time.monotonic()
    server.process.terminate()
    assert server.process.wait(END) == 0
    assert time.monotonic() - began < SOON
    client.join()
    assert answers[0].json()["error"].endswith("The server is shutting down; no more is downloaded.")
    assert [path for path in server.temporary.rglob("*") if path.is_file()] == []


def test_setup_that_fails_says_why_and_the_server_stays(start: Callable[..., Server], tmp_path: Path) -> None:
    """Half of a file is zeros, as a disk or a copy may leave it: of the right length."""
    weights = shutil.copytree(MINI, tmp_path / "damaged")
    (file,) = (weights / "decoder").glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    server = start(weights=weights)
    assert server.wait_until("READY", "SETUP_FAILED") == "SETUP_FAILED"
    assert healthcheck(server) == (1, "The server is SETUP_FAILED.\n")
    setup = server.health()["setup"]
    assert setup["status"] == "failed"
    assert (
        f"{file} is damaged at its beginning: its content differs from the checksums in {weights / 'model.json'}."
    ) in setup["logs"]
    assert server.post(SMALL).status_code == 503
    assert server.status() == "SETUP_FAILED"
    requests.post(f"{server.url}/shutdown", timeout=ANSWER)
    server.process.wait(END)


def test_a_worker_that_dies_is_noticed_and_only_shutdown_ends_the_server(
    start: Callable[..., Server], receiver: Receiver
) -> None:
    """As when the machine's memory runs out, and the kernel kills it."""
    server = start("--await-explicit-shutdown")
    server.wait_until("READY")
    server.process.terminate()
    hook = {"webhook": f"{receiver.url}/hook", "webhook_events_filter": ["completed"]}
    with server.beginning():
        server.put("mine", SLOW, {"Prefer": "respond-async"}, **hook)
    worker = server.worker()
    worker.kill()
    (end,) = receiver.webhooks("/hook")
    assert (end["status"], end["error"]) == ("failed", "Worker crashed")
    status = server.wait_until("UNHEALTHY", "DEFUNCT")
    code, said = healthcheck(server)
    assert code == 1
    assert said.startswith(f"The server is {status}.")
    requests.post(f"{server.url}/shutdown", timeout=ANSWER)
    assert server.process.wait(END) == 0


def test_pictures_are_uploaded_until_shutdown(start: Callable[..., Server], receiver: Receiver) -> None:
    server = start("--upload-url", f"{receiver.url}/bucket", "--host", "localhost", "--without-front")
    server.wait_until("READY")
    assert server.process.children() == [server.worker()]
    prediction = server.predict(**SMALL, num_images=2)
    # Cog uploads several at once and lists them as they arrive: the name says which is which.
    assert sorted(prediction["output"]) == [f"{receiver.url}/bucket/out-{i}.webp" for i in range(2)]
    uploads = sorted(receiver.received.get(timeout=ANSWER) for _ in range(2))
    for i, (method, path, kind, body) in enumerate(uploads):
        assert (method, path, kind) == ("PUT", f"/bucket/out-{i}.webp", "image/webp")
        assert Image.open(io.BytesIO(body)).size == (64, 64)
    receiver.stop()
    refused = server.post(SMALL).json()
    assert refused["status"] == "failed"
    assert "upload" in refused["error"]
    assert requests.post(f"{server.url}/shutdown", timeout=ANSWER).status_code == 200
    assert server.process.wait(END) == 0


def test_a_server_that_is_stuck_is_replaced(start: Callable[..., Server], tmp_path: Path) -> None:
    """From a clone that cannot be written, as another user's, where Cog's schema is made in a temporary folder.

    What its front keeps from Cog is sent past it. Should Cog be mended, and this fail, the front is not needed for ids.
    """
    clone = tmp_path / "clone"
    for name in ("cascade", "scripts", "serving"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("predict.py", "train.py", "cog.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    (clone / ".cog").touch()  # no folder: nobody, not even root, can write into it
    server = start(root=clone)
    server.wait_until("READY")
    assert server.post({"width": 63}).status_code == 422
    assert len(list(server.temporary.glob("cascade-serve-*"))) == 1
    with server.busy("mine"):
        assert healthcheck(server, "--busy-seconds", "60") == (0, "")
    cog = f"http://127.0.0.1:{server.worker().environ()['PORT']}"
    answer = requests.put(f"{cog}/predictions/{'a' * 256}", json={"input": SMALL}, timeout=ANSWER)
    assert "Failed to create output dir" in answer.text
    assert server.status() == "BUSY"
    assert healthcheck(server) == (0, "")
    wait_for(lambda: healthcheck(server, "--busy-seconds", "1")[0] == 1, ANSWER, "a failing check")
    assert healthcheck(server, "--busy-seconds", "1")[1].startswith("The server is BUSY, and no prediction has ")
    server.process.terminate()
    assert server.process.wait(END) == 0
    wait_for(lambda: not list(server.temporary.glob("cascade-serve-*")), ANSWER, "the temporary folder's end")
    assert healthcheck(server)[1].startswith(f"http://127.0.0.1:{server.port}/health-check does not answer as Cog's")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--port", "{taken}"], 1, "Cannot listen at 127.0.0.1, port {taken}: "),
        (["--port", "65536"], 1, "Cannot listen at 127.0.0.1, port 65536: "),
        (["--host", "no.such.host.invalid"], 1, "Cannot listen at no.such.host.invalid, port 5000: "),
        (["--port", "http"], 2, "usage: scripts/serve "),
    ],
)
def test_what_cannot_be_served_is_one_sentence(options: list[str], code: int, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        command = [sys.executable, ROOT / "scripts" / "serve", *(option.format(taken=taken) for option in options)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=END)
    assert ended.returncode == code
    assert ended.stderr.startswith(message.format(taken=taken))
    assert "Traceback" not in ended.stderr
