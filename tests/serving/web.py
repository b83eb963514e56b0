"""A server on this machine that is a picture's host: a good one, a broken one, a hostile one."""

import contextlib
import io
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

LONG = 60  # seconds; whoever waits for it fails


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """The path says what is answered."""

    server: "Web"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.asked[url.path] += 1
        self.server.headers.append(dict(self.headers))
        with contextlib.suppress(OSError):
            getattr(self, url.path.strip("/").replace("-", "_"))(**query)

    def start(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def picture(self, token: str = "") -> None:
        self.start(Content_Length=str(len(picture())))
        self.wfile.write(picture())

    def status(self, code: str, secret: str = "") -> None:
        self.start(int(code), Content_Length="0")

    def redirect(self, to: str = "/redirect") -> None:
        self.start(302, Location=to, Content_Length="0")

    def endless(self, megabytes: str = "3000") -> None:
        self.start()
        self.server.sent = 0
        for _ in range(int(megabytes)):
            self.server.sent += self.wfile.write(bytes(1_000_000))

    def announced(self, size: str) -> None:
        self.start(Content_Length=size)

    def drip(self, interval: str = "0.05") -> None:
        """A byte now and then, of the headers too."""
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
            self.wfile.write(bytes([byte]))
            time.sleep(float(interval))

    def slow_body(self, interval: str = "0.05") -> None:
        self.start()
        while True:
            self.wfile.write(b"x")
            time.sleep(float(interval))

    def silent(self) -> None:
        self.server.ended.wait(LONG)

    def cut(self) -> None:
        self.start(Content_Length="1000")
        self.wfile.write(b"x" * 10)

    def no_http(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9\r\n\r\n")

    def packed(self) -> None:
        self.start(Content_Encoding="gzip")
        self.wfile.write(b"no gzip at all")

    def log_message(self, *_: Any) -> None:
        pass


class Web(ThreadingHTTPServer):
    """Serves `Handler` at an address of this machine."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.sent = 0
        self.ended = threading.Event()
        self.url = f"http://{host}:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass

    def stop(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


@contextlib.contextmanager
def raw_server(answer: Any) -> Iterator[int]:
    """A server that calls `answer(connection)` for every connection; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def certificate(folder: Path) -> Path:
    """A file with a key and a certificate of localhost that is signed by itself."""
    key, signed, file = folder / "key.pem", folder / "certificate.pem", folder / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, "-keyout", key, "-out", signed], check=True, capture_output=True)
    file.write_text(key.read_text() + signed.read_text())
    return file
