"""A proxy in front of Cog's server: refuses requests that would end the service, and passes on all others unchanged.

Cog 0.23.1 makes a folder named after a prediction's id before it runs. An id that cannot be a folder's name (over 255
bytes, a NUL, a folder that it may not write) leaves the service BUSY forever; an id that is a path makes folders
anywhere. So the front checks the id in the path and in the body, and the size of the body. `scripts/serve` starts it:

    client -> front -> Cog's server -> worker

The front is a child of Cog's server and ends with it, so signals, exit codes and process ids are Cog's. When a client
disconnects, the front closes the request to Cog, which then cancels the prediction.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import httpx
import uvicorn

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Cog's own ids are pred_ and hexadecimal digits; Replicate's are lower-case letters and digits; many clients send UUIDs.
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}")
ALLOWED = "1 to 100 letters, digits and _ . : -, beginning with a letter or digit"
# All paths that Cog serves. Others are refused, because Cog might resolve one to a path whose id was not checked.
PATHS = re.compile(rb"/[A-Za-z0-9_.-]*|/(?:predictions|trainings)/([^/]*)(/cancel)?")
# Bytes. Cog's own limit; Cog answers 413 to larger bodies.
LARGEST_BODY = 100 * 1024 * 1024
# Commas, between values and in texts. For 10 million numbers in 20 MB, Cog's server takes 640 MB, and its worker 400 MB.
MOST_COMMAS = 1_000_000
# Bytes. After a larger body, garbage is collected at once, which takes some 20 ms.
LARGE_BODY = 2**20
# Seconds between retries. Cog answers a moment before it accepts the next request: 41 of 60 requests within a millisecond
# were refused, and none 5 ms later.
RETRIES = (0.005, 0.01, 0.02, 0.04)
# Headers of a connection, which a proxy does not forward (RFC 9110, 7.6.1).
HOP_BY_HOP = {b"connection", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding"}
HOP_BY_HOP.add(b"upgrade")
# httpx sets Content-Length for the body that it sends: the client's may differ, or the client may have sent chunks.
NOT_SENT_ON = HOP_BY_HOP | {b"content-length"}


class RefusedError(Exception):
    """A request that is not passed on; the front answers it itself."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class ClientGoneError(Exception):
    """The client has disconnected."""


class Front:
    """An ASGI application in front of Cog's server at `url`."""

    def __init__(self, url: str) -> None:
        # No timeout, because predictions may take long. A connection for each request, as without the front.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)
        self.url = httpx.URL(url)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(scope["type"])
        body = b""
        try:
            path = check_path(scope)
            body = await read(receive)
            if scope["method"] in ("POST", "PUT") and path.startswith((b"/predictions", b"/trainings")):
                check_body(body)
            await self.forward(scope, path, body, receive, send)
        except RefusedError as refused:
            await answer(send, refused.status, refused.body)
        except (ClientGoneError, httpx.HTTPError):
            pass  # uvicorn closes the connection
        finally:
            large, body = len(body) > LARGE_BODY, b""
            if large:
                gc.collect()  # reference cycles in httpx's responses keep their requests, and so the bodies, alive

    async def forward(self, scope: Scope, path: bytes, body: bytes, receive: Receive, send: Send) -> None:
        """Forward a request, and stream its response back until the client disconnects."""
        query = scope["query_string"]
        request = httpx.Request(
            scope["method"],
            self.url.copy_with(raw_path=path + (b"?" + query if query else b"")),
            headers=[pair for pair in scope["headers"] if pair[0] not in NOT_SENT_ON],
            content=body,
        )
        passing = asyncio.ensure_future(self.exchange(request, send))
        gone = asyncio.ensure_future(wait_until_gone(receive))
        try:
            await asyncio.wait({passing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                raise ClientGoneError
            await passing
        finally:
            for task in (passing, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError, RefusedError):
                await passing

    async def exchange(self, request: httpx.Request, send: Send) -> None:
        response = await self.ask(request)
        try:
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            headers = [pair for pair in headers if pair[0] not in HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    async def ask(self, request: httpx.Request) -> httpx.Response:
        """Cog's response. After 409, At capacity, asks again after each of the pauses `RETRIES`."""
        try:
            for pause in RETRIES:
                response = await self.client.send(request, stream=True)
                if response.status_code != 409:
                    return response
                await response.aclose()
                await asyncio.sleep(pause)
            return await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise RefusedError(503, {"error": "The server has ended or is ending.", "status": "failed"}) from error


def check_path(scope: Scope) -> bytes:
    """The path as the client sent it.

    Raises:
        RefusedError: Cog has no such path, or its id is not allowed.
    """
    path = scope["raw_path"]
    match = PATHS.fullmatch(path)
    if match is None:
        raise RefusedError(404, {"error": "There is nothing at this path."})
    if match[1] is not None:
        identifier = match[1].decode("latin-1")
        if match[2] and IDENTIFIER.fullmatch(identifier) is None:
            raise RefusedError(404, {})  # Cog's answer for a prediction that does not exist
        check_identifier("path", identifier)
    return path


def check_body(body: bytes) -> None:
    """Check that a body is empty, or a JSON object with an allowed id and at most `MOST_COMMAS` commas.

    Arrays are refused, because Cog reads them as the values of its fields, in order: ``["id", {}, {}, null, []]``.

    Raises:
        RefusedError: the body is something else.
    """
    top: list[tuple[str, Any]] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        top[:] = pairs  # the outermost object ends last, so its pairs remain

    if not body:
        return
    if body.count(b",") > MOST_COMMAS:
        raise RefusedError(413, {"error": f"The body has more than {MOST_COMMAS:,} commas."})
    try:
        document = json.loads(body.decode(), object_pairs_hook=note, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        raise RefusedError(400, {"error": "The body is not JSON in UTF-8."}) from None
    if document is not None or not body.lstrip(b" \t\r\n").startswith(b"{"):
        problem = {"loc": ["body"], "msg": "The body must be a JSON object.", "type": "value_error"}
        raise RefusedError(422, {"detail": [problem]})
    for name, value in top:
        if name == "id" and isinstance(value, str):
            check_identifier("body", value)


def check_identifier(place: str, identifier: str) -> None:
    if IDENTIFIER.fullmatch(identifier) is None:
        shown = identifier if len(identifier) <= 50 else f"{identifier[:50]}..."
        problem = {"loc": [place, "id"], "msg": f"id is {shown!r}; it must be {ALLOWED}.", "type": "value_error"}
        raise RefusedError(422, {"detail": [problem]})


async def read(receive: Receive) -> bytes:
    """The body of a request.

    Raises:
        RefusedError: the body is too large.
        ClientGoneError: the client disconnected before the body was complete.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise RefusedError(413, {"error": f"The body is larger than {LARGEST_BODY // 2**20} MiB."})
        if not message.get("more_body"):
            return bytes(body)


async def wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(send: Send, status: int, body: Any) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class Server(uvicorn.Server):
    """Ignores signals and ends with Cog's server, so that clients still get answers that Cog finishes."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        yield


async def serve(sockets: list[socket.socket], port: int, parent: int) -> None:
    """Wait until Cog's server listens, then serve until it has ended.

    Args:
        sockets: bound sockets to serve on.
        port: where Cog's server listens at 127.0.0.1.
        parent: the process id of Cog's server, whose child this process is.
    """
    while os.getppid() == parent:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            break
        await asyncio.sleep(0.02)
    config = uvicorn.Config(
        Front(f"http://127.0.0.1:{port}"),
        http="h11",
        loop="asyncio",
        lifespan="off",
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    server = Server(config)

    async def end() -> None:
        while os.getppid() == parent:
            await asyncio.sleep(0.1)
        server.should_exit = True

    names = {one.getsockname()[:2] for one in sockets}
    where = " and ".join(f"http://{f'[{host}]' if ':' in host else host}:{number}" for host, number in sorted(names))
    sys.stderr.write(f"Serving at {where}.\n")
    sys.stderr.flush()
    ending = asyncio.create_task(end())
    await server.serve(sockets)
    await ending


def main() -> None:
    """Run the front; scripts/server.py starts it with these arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sockets", type=int, nargs="+", help="descriptors of bound sockets")
    parser.add_argument("--to", type=int, help="the port of Cog's server at 127.0.0.1")
    parser.add_argument("--parent", type=int, help="the process id of Cog's server")
    parser.add_argument("--remove", help="a folder to remove at the end")
    options = parser.parse_args()
    asyncio.run(serve([socket.socket(fileno=number) for number in options.sockets], options.to, options.parent))
    if options.remove:
        shutil.rmtree(options.remove, ignore_errors=True)


if __name__ == "__main__":
    main()
