"""Downloads the URLs of a request to temporary files: in parallel, within limits of time and size."""

import contextlib
import itertools
import os
import socket
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from cascade.limits import InputError
from serving.data_urls import data_of
from serving.download import DownloadError, Limits, StoppedError, download

# Seconds between checks for a cancellation.
HEARD = 0.1
# Downloads at a time.
AT_ONCE = 8


@dataclass(frozen=True)
class UrlSettings:
    """Settings for downloading inputs.

    Args:
        limits: of each URL. All downloads start together.
        public_only: refuse addresses that are not public.
    """

    limits: Limits = field(default_factory=Limits)
    public_only: bool = False

    @classmethod
    def from_environment(cls) -> "UrlSettings":
        """CASCADE_PUBLIC_URLS_ONLY (0 or 1, default 0), CASCADE_URL_SECONDS (60) and CASCADE_URL_MEGABYTES (100).

        Raises:
            ValueError: a variable has a value that is not allowed.
        """
        public_only = os.environ.get("CASCADE_PUBLIC_URLS_ONLY") or "0"
        if public_only not in ("0", "1"):
            raise ValueError(f"CASCADE_PUBLIC_URLS_ONLY is {public_only!r}; it must be 0 or 1.")
        seconds = positive("CASCADE_URL_SECONDS", 60)
        size = round(1e6 * positive("CASCADE_URL_MEGABYTES", 100))
        return cls(Limits(seconds=seconds, idle_seconds=seconds, size=size), public_only == "1")


def positive(name: str, default: float) -> float:
    """The number in an environment variable, above 0 and below 1000000."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise ValueError(f"{name} is {text!r}; it must be a number above 0 and below 1000000.")


@contextlib.contextmanager
def downloaded(inputs: Mapping[str, Any], names: Collection[str], settings: UrlSettings) -> Iterator[dict[str, Any]]:
    """The inputs, with every http, https and data URL replaced by a file. The files are deleted at the end.

    Args:
        inputs: checked inputs by name.
        names: the inputs that are files, or lists or tuples of files. Values that are no URL stay unchanged.

    Raises:
        InputError: a URL cannot be decoded or downloaded. The other downloads are stopped.
    """
    found = dict(inputs)
    urls: dict[str, tuple[str, Path]] = {}
    numbers = itertools.count()
    # scripts/healthcheck notices when this folder is made and removed: so it knows that predictions begin and end.
    with tempfile.TemporaryDirectory(prefix="cascade-inputs-") as folder:

        def file_of(label: str, value: Any) -> Any:
            scheme = value[:6].partition(":")[0].lower() if isinstance(value, str) and ":" in value[:6] else ""
            target = Path(folder) / str(next(numbers))
            if scheme == "data":
                decode(label, value, target)
            elif scheme in ("http", "https"):
                urls[label] = value, target
            else:
                return value
            return target

        for name in names:
            value = inputs[name]
            if isinstance(value, list | tuple):
                found[name] = tuple(file_of(f"{name}[{place}]", one) for place, one in enumerate(value))
            else:
                found[name] = file_of(name, value)
        download_all(urls, settings)
        yield found


def decode(label: str, url: str, target: Path) -> None:
    """Write the content of a data URL to a file."""
    try:
        with target.open("wb") as file:
            file.writelines(data_of(url))
    except ValueError:
        raise InputError(f"{label} is a data URL that cannot be decoded.") from None


def download_all(
    urls: dict[str, tuple[str, Path]], settings: UrlSettings, headers: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Download URLs to files, by label. If this ends early, all downloads stop within a second.

    headers: of each request; Authorization is not forwarded to another host.
    """
    if not urls:
        return
    stop = threading.Event()
    server = Server()
    with ThreadPoolExecutor(AT_ONCE) as threads, set_at_end(stop):
        futures: dict[Future[int], tuple[str, str]] = {}
        for label, (url, target) in urls.items():
            options = {"public_only": settings.public_only, "headers": headers, "stop": stop}
            future = threads.submit(download, url, target, settings.limits, **options)
            futures[future] = label, url
        waiting = set(futures)
        while waiting:
            # A timeout, because Cog cancels by an exception, which Python raises between two instructions only.
            done, waiting = wait(waiting, HEARD, FIRST_EXCEPTION)
            for future in done:
                label, url = futures[future]
                try:
                    future.result()
                except (DownloadError, StoppedError) as error:
                    raise InputError(f"{label} could not be downloaded from {host_of(url)}: {error}.") from None
            if server.has_ended():
                raise RuntimeError("The server is shutting down; no more is downloaded.")


@contextlib.contextmanager
def set_at_end(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def host_of(url: str) -> str:
    """A URL's host and port, for error messages: its path and query may hold secrets."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        return "its URL"
    return parsed.netloc.decode()[:100] or "its URL"


class Server:
    """Cog's server, if this process is its worker. At SIGTERM it stops listening, and waits for the running prediction."""

    def __init__(self) -> None:
        port = os.environ.get("PORT") or "5000"
        self.address = ("127.0.0.1", int(port)) if "COG_PREDICT_TYPE_STUB" in os.environ else None
        self.next = time.monotonic()
        # If it listens elsewhere, its end cannot be noticed.
        if self.address is not None and not self.listens():
            self.address = None

    def listens(self) -> bool:
        self.next = time.monotonic() + 0.5
        with contextlib.suppress(TimeoutError):
            try:
                socket.create_connection(self.address, timeout=0.2).close()
            except ConnectionRefusedError:
                return False
        return True

    def has_ended(self) -> bool:
        return self.address is not None and time.monotonic() >= self.next and not self.listens()
