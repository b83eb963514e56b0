"""Download a file from an untrusted URL, within limits of time and size.

httpx sends the request and follows redirects; its httpcore accepts our own connections (serving/network.py). requests
and urllib3 have no public way to choose the address of a connection. huggingface_hub installs both.
"""

import contextlib
import functools
import http
import logging
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpcore
import httpx

from serving.network import SLICE, Network, NotPublicError, UnknownNameError, UnreachableError

# At INFO, httpx logs every URL, whose query may hold secrets.
logging.getLogger("httpx").setLevel(logging.WARNING)

REDIRECTS = 5
SCHEMES = ("http", "https")


@dataclass(frozen=True)
class Limits:
    """Limits of a download.

    Args:
        seconds: total, from resolving the host name to the last byte.
        idle_seconds: longest time without receiving anything.
        size: bytes of the stored file, after decompression.
    """

    seconds: float = 60.0
    idle_seconds: float = 60.0
    size: int = 100_000_000


class DownloadError(ValueError):
    """A download failed. The message is a clause that says why, such as "the server answered 404 Not Found"."""


class StoppedError(Exception):
    """A download was stopped by its caller."""


class Watch:
    """Ends a download at its limits, or when `stop` is set."""

    def __init__(self, limits: Limits, stop: threading.Event) -> None:
        self.limits = limits
        self.stop = stop
        self.end = time.monotonic() + limits.seconds
        self.received()

    def received(self) -> None:
        self.idle_end = time.monotonic() + self.limits.idle_seconds

    def seconds(self) -> float:
        if self.stop.is_set():
            raise StoppedError
        now = time.monotonic()
        if now >= self.end:
            raise DownloadError(f"it took longer than {self.limits.seconds:g} seconds")
        if now >= self.idle_end:
            raise DownloadError(f"nothing came for {self.limits.idle_seconds:g} seconds")
        return min(SLICE, self.end - now, self.idle_end - now)


def download(
    url: str,
    target: Path,
    limits: Limits | None = None,
    *,
    public_only: bool = False,
    headers: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Download a URL to a file. A failed download leaves no file.

    HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY are used unless `public_only` is set: a proxy resolves names itself,
    so the address that it connects to cannot be checked. SSL_CERT_FILE and SSL_CERT_DIR name other certificates to trust.

    Args:
        target: the file; must not exist.
        limits: default to those of a picture.
        public_only: refuse addresses that are not public, after redirects, too. Errors then do not distinguish a closed
            port from an open one, nor a private name from an unknown one.
        headers: sent with the request; Authorization is not forwarded to another host.
        stop: ends the download within `SLICE` seconds once it is set.

    Returns:
        The file's size in bytes.

    Raises:
        DownloadError: the download failed or exceeded a limit.
        StoppedError: `stop` was set.
    """
    watch = Watch(limits or Limits(), stop or threading.Event())
    with explained(public_only):
        try:
            with (
                Transport(Network(watch, public_only), direct=public_only) as transport,
                httpx.Client(transport=transport, follow_redirects=True, max_redirects=REDIRECTS) as client,
                client.stream("GET", url, headers={"Accept-Encoding": "identity", **(headers or {})}) as response,
            ):
                return store(response, target, watch)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def store(response: httpx.Response, target: Path, watch: Watch) -> int:
    """Write a response's body to a file; returns its size in bytes."""
    if response.status_code != http.HTTPStatus.OK:
        raise DownloadError(f"the server answered {describe(response.status_code)}")
    limit = watch.limits.size
    too_large = DownloadError(f"it is larger than {limit / 1e6:g} MB")
    declared = response.headers.get("Content-Length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        raise too_large
    size = 0
    with target.open("xb") as file:
        for data in response.iter_bytes():
            size += len(data)
            if size > limit:
                raise too_large
            file.write(data)
    return size


def describe(status: int) -> str:
    """A status as "404 Not Found". Uses the standard phrase, because the server's own text is not trusted."""
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


class Transport(httpx.BaseTransport):
    """Sends httpx's requests over a `Network`; through a proxy if the environment names one, unless `direct` is set."""

    def __init__(self, network: Network, *, direct: bool) -> None:
        self.network = network
        self.direct = direct
        self.pools: dict[str | None, httpcore.ConnectionPool] = {}

    def pool(self, url: httpx.URL) -> httpcore.ConnectionPool:
        proxy = None if self.direct else proxy_of(url)
        if proxy not in self.pools:
            options = {"network_backend": self.network}
            if url.scheme == "https" or (proxy or "").startswith("https:"):
                options["ssl_context"] = tls_context()
            if proxy is None:
                self.pools[proxy] = httpcore.ConnectionPool(**options)
            else:
                self.pools[proxy] = httpcore.ConnectionPool(proxy=as_proxy(proxy), **options)
        return self.pools[proxy]

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.scheme not in SCHEMES or not url.host:
            raise httpx.UnsupportedProtocol("")
        response = self.pool(url).handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
            )
        )
        return httpx.Response(status_code=response.status, headers=response.headers, stream=Body(response))

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


class Body(httpx.SyncByteStream):
    """The body of httpcore's response, in the type that httpx takes."""

    def __init__(self, response: httpcore.Response) -> None:
        self.response = response

    def __iter__(self) -> Iterator[bytes]:
        yield from self.response.stream

    def close(self) -> None:
        self.response.close()


def proxy_of(url: httpx.URL) -> str | None:
    """The proxy that the environment names for a URL."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def as_proxy(proxy: str) -> httpcore.Proxy:
    try:
        url = httpx.URL(proxy)
    except httpx.InvalidURL:
        url = None
    if url is None or url.scheme not in SCHEMES or not url.host:
        raise DownloadError("the proxy that the environment names is not an http or https URL")
    auth = (url.username, url.password) if url.username else None
    return httpcore.Proxy(
        httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/"),
        auth=auth and tuple(part.encode() for part in auth),
    )


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The certificates to trust. Cached, because reading them takes some 20 ms.

    Raises:
        DownloadError: SSL_CERT_FILE or SSL_CERT_DIR names no readable certificates.
    """
    try:
        return httpx.create_ssl_context()
    except OSError:
        names = " or ".join(name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name))
        raise DownloadError(f"{names or 'the certificate store'} names no readable certificates") from None


@contextlib.contextmanager
def explained(public_only: bool) -> Iterator[None]:
    """Turn the errors of a download into a `DownloadError` whose message is one clause.

    With `public_only`, errors that could reveal something about the network have the same message.
    """
    try:
        yield
    except (NotPublicError, UnknownNameError):
        raise DownloadError(
            "its host has no public address" if public_only else "its host cannot be resolved"
        ) from None
    except (
        UnreachableError,
        ssl.SSLError,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.ProxyError,
    ) as error:
        raise DownloadError("its server gave no answer" if public_only else why(error)) from None
    except httpx.TooManyRedirects:
        raise DownloadError(f"it redirects more than {REDIRECTS} times") from None
    except httpx.DecodingError:
        raise DownloadError("the server's answer is compressed in a way that cannot be undone") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.RemoteProtocolError, httpcore.UnsupportedProtocol):
        raise DownloadError("it is, or redirects to, something that is not a valid http or https URL") from None
    except OSError as error:
        raise DownloadError(f"it could not be stored ({error.strerror})") from None


def why(error: Exception) -> str:
    """A connection's error as a clause."""
    if isinstance(error, UnreachableError):
        return "nothing answers there"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's TLS certificate is not valid ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return "the TLS handshake failed"
    if isinstance(error, httpcore.ProxyError):
        return "the proxy refused it"
    if isinstance(error, httpcore.NetworkError):
        return "the connection broke"
    return "the server's answer is not HTTP, or not complete"
