"""``scripts/serve`` in a process of its own, a client of it, and a receiver of what it sends: all real."""

import base64
import contextlib
import importlib.util
import io
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import requests
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
MINI = ROOT / "weights" / "mini"
Image.init()  # fills Image.MIME
# Generous: they end tests that would never end, and measure nothing.
START, ANSWER = 300, 120
# An end is heard after 0.1 to 1.1 s on an idle machine; one that is not heard takes 60.
SOON = 15

SMALL = {"width": 64, "height": 64, "steps_prior": 1, "steps_decoder": 1}
SLOW = {"width": 256, "height": 256, "steps_prior": 50, "steps_decoder": 50, "num_images": 4}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Any, seconds: float, what: str, longest: float = 0.25) -> Any:
    """The first true value of ``condition()``.

    The longer it waits, the rarer it asks: every 0.02 s at first, every `longest` s in the end. To ask a server how it is takes
    7 ms of the processor; asked fifty times a second while it started, it took half as long again.
    """
    end, pause = time.monotonic() + seconds, 0.02
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(pause)
        pause = min(1.2 * pause, longest)
    raise AssertionError(f"{what}: not within {seconds} s")


class Server:
    """A server, and a client of it. ``folder`` gets its log and its temporary files; ``variables`` are its environment's.

    A prediction's answer arrives a moment before the server takes the next one, so whoever wants that waits for READY.
    """

    def __init__(self, folder: Path, *options: str, weights: Path = MINI, root: Path = ROOT, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = folder / "log"
        environment = {**os.environ, "TMPDIR": str(self.temporary), "CASCADE_WEIGHTS": str(weights), **variables}
        # A GPU's machine may lack what the front is served by.
        front = [] if importlib.util.find_spec("uvicorn") else ["--without-front"]
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                # By its module: the script would first install the locked packages, where a GPU's machine has others.
                [sys.executable, "-m", "scripts.server", "--port", str(self.port), *front, *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=root,
            )

    def health(self) -> dict[str, Any]:
        """What /health-check says; {} while nothing listens yet."""
        try:
            answer = requests.get(f"{self.url}/health-check", timeout=ANSWER)
        except requests.ConnectionError:
            assert self.process.poll() is None, self.log.read_text()
            return {}
        assert answer.status_code == 200
        return answer.json()

    def status(self) -> str | None:
        return self.health().get("status")

    def wait_until(self, *statuses: str) -> str:
        return wait_for(
            lambda: status if (status := self.status()) in statuses else None, START, f"{statuses} of {self.url}"
        )

    def post(self, inputs: Any, headers: dict[str, str] | None = None, **more: Any) -> requests.Response:
        return self.send({"input": inputs, **more}, headers)

    def send(self, body: Any, headers: dict[str, str] | None = None) -> requests.Response:
        return requests.post(f"{self.url}/predictions", json=body, headers=headers, timeout=ANSWER)

    def put(self, identifier: str, inputs: Any, headers: dict[str, str] | None = None, **more: Any) -> Any:
        url = f"{self.url}/predictions/{identifier}"
        return requests.put(url, json={"input": inputs, **more}, headers=headers, timeout=ANSWER)

    def cancel(self, identifier: str) -> requests.Response:
        return requests.post(f"{self.url}/predictions/{identifier}/cancel", timeout=ANSWER)

    def post_when_ready(self, inputs: Any) -> requests.Response:
        """The answer to a request that may come while the server still works on the one before."""
        answer = self.post(inputs)
        while answer.status_code == 409:
            self.wait_until("READY")
            answer = self.post(inputs)
        return answer

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        answer = self.post_when_ready(inputs)
        assert answer.status_code == 200, answer.text
        prediction = answer.json()
        assert prediction["status"] == "succeeded", prediction
        return prediction

    def error(self, **inputs: Any) -> str:
        """The sentence of a small request that must fail."""
        prediction = self.post_when_ready({**SMALL, **inputs}).json()
        assert prediction["status"] == "failed", prediction
        return prediction["error"].partition("Error: ")[2]

    def files(self) -> list[Path]:
        """What lies in the temporary folder, but for the pictures that were made last."""
        return [path for path in self.temporary.rglob("*") if path.is_file() and not path.match("cascade-*/out-*")]

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """A block that ends when the prediction that was asked for in it has begun.

        Cog is BUSY before that, but if it is told to cancel then, it says yes and lets the prediction run to its end.
        """
        self.wait_until("READY")
        before = self.log.read_text().count("Seeds: ")
        yield
        # Asked often: meanwhile it computes what nobody looks at.
        wait_for(lambda: self.log.read_text().count("Seeds: ") > before, ANSWER, "the prediction's first line", 0.02)

    @contextlib.contextmanager
    def busy(self, identifier: str, **more: Any) -> Iterator[requests.Response]:
        """While it works on a slow request, which is cancelled at the end; gives the answer to that."""
        with self.beginning():
            answer = self.put(identifier, SLOW, {"Prefer": "respond-async"}, **more)
        try:
            yield answer
        finally:
            self.cancel(identifier)
            self.wait_until("READY")

    def abandon(self, **more: Any) -> None:
        """Ask for a slow prediction, and go away when it has begun."""
        body = json.dumps({"input": SLOW, **more}).encode()
        head = f"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=ANSWER) as client, self.beginning():
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)

    def worker(self) -> psutil.Process:
        """The process that makes the pictures."""
        (worker,) = [child for child in self.process.children() if "_run_worker" in child.cmdline()[-1]]
        return worker

    def memory(self) -> int:
        """Resident bytes of the server and its worker."""
        return sum(process.memory_info().rss for process in (self.process, *self.process.children(recursive=True)))

    def stop(self) -> None:
        """End it and what it started, however it is."""
        processes = [self.process, *self.process.children(recursive=True)] if self.process.is_running() else []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class Receiver:
    """A server that takes every PUT and POST, and keeps (method, path, content type, body)."""

    def __init__(self) -> None:
        self.received: queue.Queue[tuple[str, str, str, bytes]] = queue.Queue()
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def take(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                received.put((self.command, self.path, self.headers["Content-Type"], body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_PUT = do_POST = take

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def webhooks(self, path: str) -> list[dict[str, Any]]:
        """What was posted to a path, up to and with the prediction's end."""
        found = []
        while not found or found[-1]["status"] not in ("succeeded", "failed", "canceled"):
            method, to, _, body = self.received.get(timeout=ANSWER)
            if (method, to) == ("POST", path):
                found.append(json.loads(body))
        return found


def data_url(content: Image.Image | bytes, kind: str = "PNG", **options: Any) -> str:
    """A picture, stored in a format with options of Pillow, or what claims to be one, as a client sends it."""
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, kind, **options)
        content = file.getvalue()
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(content).decode()}"


def picture(output: str) -> Image.Image:
    """The picture of a data URL, decoded whole."""
    header, _, data = output.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert header == f"data:{Image.MIME[image.format]};base64"
    return image
