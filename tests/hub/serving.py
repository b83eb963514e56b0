"""A local Hub and CDN that answer huggingface_hub's requests for downloads.

As on the real Hub: a gated repository's metadata is public, its files are not. A repository that the user may not see does
not exist. A large file redirects to a signed URL on another host, which supports ranges. A small file redirects to a URL
on the Hub itself, and is sent compressed.
"""

import contextlib
import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".jpg")
TOKEN = "hf_good"
SIGNATURE = "signed"


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository. Only files in large-file storage have a `sha256`."""

    content: Path
    size: int
    blob: str
    sha256: str | None

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        sha256 = hashlib.sha256(content).hexdigest() if path.suffix in LARGE else None
        return cls(path, len(content), blob, sha256)

    def described(self, path: str, size: int) -> dict[str, Any]:
        entry = {"rfilename": path, "size": size, "blobId": self.blob}
        if self.sha256 is not None:
            entry["lfs"] = {"sha256": self.sha256, "size": size, "pointerSize": 134}
        return entry


def list_repository(folder: Path) -> dict[str, StoredFile]:
    """The files of a repository, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): StoredFile.of(path) for path in files}


@dataclass
class Break:
    """How a connection breaks.

    Attributes:
        after: bytes of the answer that are sent.
        reset: whether the connection is reset rather than closed.
        until: event to wait for after these bytes, before the connection breaks.
    """

    after: int
    reset: bool = False
    until: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Seen:
    """A request: `host` is "hub" or "cdn"."""

    host: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """The two servers. Tests change these attributes:

    Attributes:
        repositories: files by the repository's name and revision.
        gated: names of gated repositories whose conditions the user has not accepted.
        sizes, contents: by path, wrong sizes that the Hub claims, and wrong content that the CDN sends.
        breaks: by path, how the next connections to the CDN break. Later ones are complete.
        answer: status, error code and message of every answer.
        seen: all requests.
    """

    repositories: dict[tuple[str, str], dict[str, StoredFile]]
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    breaks: dict[str, list[Break]] = field(default_factory=dict)
    answer: tuple[int, str, str] | None = None
    seen: list[Seen] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (HubHandler, CdnHandler)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            server.hub = self
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fetched(self) -> list[str]:
        """The paths of the requested files, as ``<owner>/<name>/<path>``, in order."""
        matches = (re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", seen.path) for seen in self.seen if seen.host == "hub")
        return [f"{match[1]}/{match[2]}" for match in matches if match]

    def ranges(self) -> list[str | None]:
        """The ranges requested from the CDN, in order."""
        return [seen.range for seen in self.seen if seen.host == "cdn"]


class Handler(BaseHTTPRequestHandler):
    """The base of both servers' handlers."""

    protocol_version = "HTTP/1.1"
    host: str

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def note(self) -> str:
        """Record the request, and return the URL's path."""
        path = unquote(urlsplit(self.path).path)
        if path != "/api/agent-harnesses":  # the client requests this once a day
            self.hub.seen.append(Seen(self.host, path, self.headers["Range"], self.headers["Authorization"]))
        return path

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.reply(status, headers, json.dumps({"error": message}).encode())

    def log_message(self, *_: Any) -> None:
        pass


class HubHandler(Handler):
    host = "hub"

    def do_GET(self) -> None:
        path = self.note()
        if self.hub.answer is not None:
            self.refuse(*self.hub.answer)
            return
        if self.headers["Authorization"] not in (None, f"Bearer {TOKEN}"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)/auth-check", self.check_access),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self.describe),
            (r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", self.send_small),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                if self.may_see(match[1]):
                    method(*match.groups())
                return
        self.refuse(404, "", "Sorry, we can't find the page you are looking for.")

    def may_see(self, name: str) -> bool:
        if any(name == known for known, _ in self.hub.repositories):
            return True
        if self.headers["Authorization"]:
            self.refuse(404, "RepoNotFound", "Repository not found")
        else:
            self.refuse(401, "", "Invalid username or password.")
        return False

    def may_read(self, name: str) -> bool:
        if name not in self.hub.gated:
            return True
        status = 403 if self.headers["Authorization"] else 401
        self.refuse(status, "GatedRepo", f"Access to model {name} is restricted.")
        return False

    def files_of(self, name: str, revision: str) -> dict[str, StoredFile] | None:
        files = self.hub.repositories.get((name, revision))
        if files is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def check_access(self, name: str) -> None:
        if self.may_read(name):
            self.reply(200, {"Content-Type": "text/plain"}, b"OK")

    def describe(self, name: str, revision: str) -> None:
        files = self.files_of(name, revision)
        if files is None:
            return
        siblings = [file.described(path, self.hub.sizes.get(path, file.size)) for path, file in files.items()]
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            siblings = [{"rfilename": path} for path in files]
        model = {
            "_id": "65c9f3b1d5e6a7b8c9d0e1f2",
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": revision,
            "lastModified": "2024-07-10T19:27:40.000Z",
            "createdAt": "2024-02-08T15:14:17.000Z",
            "private": False,
            "gated": "auto" if name in self.hub.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 1,
            "tags": [],
            "siblings": siblings,
        }
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(model).encode())

    def resolve(self, name: str, revision: str, path: str) -> None:
        files = self.files_of(name, revision)
        if files is None or not self.may_read(name):
            return
        if path not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        file = files[path]
        headers = {"X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        if file.sha256 is None:
            location = f"/api/resolve-cache/models/{name}/{revision}/{quote(path, safe='')}"
            self.reply(307, {**headers, "Location": location, "ETag": f'"{file.blob}"'})
            return
        location = f"{self.hub.cdn_url}/{name}/{revision}/{path}?Signature={SIGNATURE}"
        linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
        self.reply(302, {**headers, **linked, "Location": location})

    def send_small(self, name: str, revision: str, path: str) -> None:
        file = self.hub.repositories[name, revision][path]
        body = self.hub.contents.get(path, file.content.read_bytes())
        headers = {"ETag": f'"{file.blob}"', "Content-Type": "text/plain; charset=utf-8", "X-Repo-Commit": revision}
        if "gzip" in self.headers["Accept-Encoding"]:
            self.reply(200, {**headers, "Content-Encoding": "gzip"}, gzip.compress(body))
        else:
            self.reply(200, headers, body)


class CdnHandler(Handler):
    host = "cdn"

    def do_GET(self) -> None:
        owner, name, revision, path = self.note()[1:].split("/", 3)
        # A signed URL is the only permission. The client must not send a token here.
        if parse_qs(urlsplit(self.path).query) != {"Signature": [SIGNATURE]} or self.headers["Authorization"]:
            self.reply(403, {})
            return
        file = self.hub.repositories[f"{owner}/{name}", revision][path]
        content = self.hub.contents.get(path) or file.content.read_bytes()
        start = 0
        if self.headers["Range"]:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(content):
                self.reply(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{file.sha256}"')
        self.end_headers()
        breaks = self.hub.breaks.get(path)
        with contextlib.suppress(ConnectionError):  # the client was killed
            if breaks:
                self.end_early(memoryview(content)[start:], breaks.pop(0))
            else:
                self.wfile.write(memoryview(content)[start:])

    def end_early(self, content: memoryview, how: Break) -> None:
        self.wfile.write(content[: how.after])
        end = time.monotonic() + 30
        while not how.until() and time.monotonic() < end:
            time.sleep(0.01)
        if how.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
