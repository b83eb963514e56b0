"""A front for Cog's server: refuses what would end the service, and passes all else on unchanged.

Cog 0.23.1 makes a folder named by a prediction's id before it runs. An id that cannot be a folder's name (over 255 bytes,
a NUL, a place where it may not write) leaves the service BUSY for ever; one that is a path makes folders anywhere. So
the front looks at the id, in the path and in the body, and at nothing else. `scripts/serve` starts it:

    client -> front -> Cog's server -> worker

The front is a child of Cog's server and ends with it, so signals, exit codes and process ids are Cog's. When a client
goes away, so does its request to Cog, which then cancels the prediction.
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

# Cog's own are pred_ and hexadecimal digits; Replicate's are lower-case letters and digits; many send UUIDs.
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}")
ALLOWED = "1 to 100 letters, digits, and signs of _ . : - after the first"
# All that Cog serves. A path that is none of these could still reach one of them in a way that the check doesn't see.
PATHS = re.compile(rb"/[A-Za-z0-9_.-]*|/(?:predictions|trainings)/([^/]*)(/cancel)?")
# As Cog's server: above it answers 413.
LARGEST_BODY = 100 * 1024 * 1024
# Between values, and in texts. Of 10 million numbers in 20 MB, Cog's server takes 640 MB, and its worker 400.
MOST_COMMAS = 1_000_000
# From this size on, what is left of a body is looked for at once, in some 20 ms.
LARGE_BODY = 2**20
# Cog answers a moment before it takes the next request. 41 of 60 requests in the same millisecond were refused; none
# was 5 ms later.
RETRIES = (0.005, 0.01, 0.02, 0.04)
# Of one connection, not of a request.
HOP_BY_HOP = {b"connection", b"expect", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding"}
HOP_BY_HOP.add(b"upgrade")
# httpx says how long the body is that it sends: a client may have said something else, and sent it in chunks.
NOT_SENT_ON = HOP_BY_HOP | {b"content-length"}


class RefusedError(Exception):
    """A request is not passed on."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class ClientGoneError(Exception):
    """The client does not wait for an answer any more."""


class Front:
    """An ASGI application in front of Cog's server at `url`."""

    def __init__(self, url: str) -> None:
        # A prediction takes as long as it takes; and every request has a connection of its own, as without the front.
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
                gc.collect()  # httpx's responses are in cycles, and have their requests, which have the bodies

    async def forward(self, scope: Scope, path: bytes, body: bytes, receive: Receive, send: Send) -> None:
        """Send a request on and its answer back, piece by piece, until the client goes."""
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
        """Cog's answer; asked again for a moment if it is 409, At capacity."""
        try:
            for pause in RETRIES:
                response = await self.client.send(request, stream=True)
                if response.status_code != 409:
                    return response
                await response.aclose()
                await asyncio.sleep(pause)
            return await self.client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise RefusedError(503, {"error": "The server has ended, or is about to.", "status": "failed"}) from error


def check_path(scope: Scope) -> bytes:
    """The path as the client sent it.

    Raises:
        RefusedError: Cog has no such path, or the id in it is not allowed.
    """
    path = scope["raw_path"]
    match = PATHS.fullmatch(path)
    if match is None:
        raise RefusedError(404, {"error": "There is nothing at this path."})
    if match[1] is not None:
        identifier = match[1].decode("latin-1")
        if match[2] and IDENTIFIER.fullmatch(identifier) is None:
            raise RefusedError(404, {})  # as Cog, of a prediction that isn't there
        check_identifier("path", identifier)
    return path


def check_body(body: bytes) -> None:
    """Make sure that a body, if there is one, is a JSON object whose id is allowed, of a bounded number of values.

    Cog reads an array, too, as the values of its fields in their order: ``["id", {}, {}, null, []]``.

    Raises:
        RefusedError: it is not.
    """
    top: list[tuple[str, Any]] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        top[:] = pairs  # of the outermost object, which is read to its end last

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
        RefusedError: it is too large.
        ClientGoneError: it does not arrive.
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
    """Ends with Cog's server, not at signals: whoever is answered at that moment gets the answer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        yield


async def serve(sockets: list[socket.socket], port: int, parent: int) -> None:
    """Serve on sockets that are bound, from when Cog's server listens on a port until it has ended.

    Args:
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
    """Start beside Cog's server; scripts/server.py gives the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sockets", type=int, nargs="+", help="descriptors of bound sockets")
    parser.add_argument("--to", type=int, help="the port of Cog's server at 127.0.0.1")
    parser.add_argument("--parent", type=int, help="the process id of Cog's server")
    parser.add_argument("--remove", help="a folder to remove then")
    options = parser.parse_args()
    asyncio.run(serve([socket.socket(fileno=number) for number in options.sockets], options.to, options.parent))
    if options.remove:
        shutil.rmtree(options.remove, ignore_errors=True)


if __name__ == "__main__":
    main()
