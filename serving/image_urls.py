"""Files for the URLs of a request: all of them together, within limits, and gone afterwards."""

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
from typing import Any

import httpx

from cascade.limits import InputError
from serving.data_urls import data_of
from serving.download import DownloadError, Limits, StoppedError, download

# Seconds after which a cancellation is heard.
HEARD = 0.1
AT_ONCE = 8


@dataclass(frozen=True)
class UrlSettings:
    """How inputs are downloaded.

    Args:
        limits: of each URL; they begin together.
        public_only: refuse addresses that are not public.
    """

    limits: Limits = field(default_factory=Limits)
    public_only: bool = False

    @classmethod
    def from_environment(cls) -> "UrlSettings":
        """CASCADE_PUBLIC_URLS_ONLY (0 or 1, default 0), CASCADE_URL_SECONDS (60) and CASCADE_URL_MEGABYTES (100).

        Raises:
            ValueError: one has another value.
        """
        public_only = os.environ.get("CASCADE_PUBLIC_URLS_ONLY") or "0"
        if public_only not in ("0", "1"):
            raise ValueError(f"CASCADE_PUBLIC_URLS_ONLY is {public_only!r}; it must be 0 or 1.")
        seconds = positive("CASCADE_URL_SECONDS", 60)
        size = round(1e6 * positive("CASCADE_URL_MEGABYTES", 100))
        return cls(Limits(seconds=seconds, idle_seconds=seconds, size=size), public_only == "1")


def positive(name: str, default: float) -> float:
    """An environment variable's number."""
    text = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise ValueError(f"{name} is {text!r}; it must be a number above 0 and below 1000000.")


@contextlib.contextmanager
def downloaded(inputs: Mapping[str, Any], names: Collection[str], settings: UrlSettings) -> Iterator[dict[str, Any]]:
    """Inputs with a file in the place of every http, https and data URL; the files are deleted afterwards.

    Args:
        inputs: by name, checked.
        names: of the inputs that are files, or lists or tuples of files. What is neither file nor URL in them stays as it is.

    Raises:
        InputError: a URL cannot be decoded or downloaded. The rest is then stopped.
    """
    found = dict(inputs)
    urls: dict[str, tuple[str, Path]] = {}
    numbers = itertools.count()
    # Its making and its end are what scripts/healthcheck knows a run's beginning and end by.
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
    """Write what a data URL holds to a file."""
    try:
        with target.open("wb") as file:
            file.writelines(data_of(url))
    except ValueError:
        raise InputError(f"{label} is a data URL that cannot be decoded.") from None


def download_all(urls: dict[str, tuple[str, Path]], settings: UrlSettings) -> None:
    """Download URLs to files, by label. Whatever ends this ends all downloads, within a second."""
    if not urls:
        return
    stop = threading.Event()
    server = Server()
    with ThreadPoolExecutor(AT_ONCE) as threads, set_at_end(stop):
        futures: dict[Future[int], tuple[str, str]] = {}
        for label, (url, target) in urls.items():
            future = threads.submit(download, url, target, settings.limits, public_only=settings.public_only, stop=stop)
            futures[future] = label, url
        waiting = set(futures)
        while waiting:
            # In slices, because Cog cancels by an exception that is raised between two instructions of Python.
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
    """A URL's host and port: the rest may hold secrets."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        return "its URL"
    return parsed.netloc.decode()[:100] or "its URL"


class Server:
    """Cog's server, if this process is its worker. At SIGTERM it stops listening, and waits for what is being made."""

    def __init__(self) -> None:
        port = os.environ.get("PORT") or "5000"
        self.address = ("127.0.0.1", int(port)) if "COG_PREDICT_TYPE_STUB" in os.environ else None
        self.next = time.monotonic()
        # It may listen elsewhere: then its end cannot be seen.
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
