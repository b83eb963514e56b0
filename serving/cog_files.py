"""What Cog does with files around a run, done in its place. Read in Cog and coglet 0.23.1.

Cog's worker downloads the inputs of `run` that are annotated with `cog.Path` before it calls `run`. It sets no limits,
hears no cancellation meanwhile, and leaves what it has downloaded when another download of the request fails. It reads
the annotations anew for every prediction, from the instance's `run`, and hands on text as it is. So `with_files` wraps
`run` in a function that says of these inputs that they are text, downloads them itself, and calls `run` with the files.
The schema keeps `format: uri`: it is made from predict.py's source.

Cog also leaves three empty folders of every prediction; `sweep` removes them.
"""

import contextlib
import functools
import os
import reprlib
import socket
import tempfile
import threading
import time
import typing
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cog
import httpx

from serving.download import DownloadError, Limits, StoppedError, download

# One for each prediction, with the folders "inputs" and "outputs" in it.
COG_FOLDERS = Path("/tmp/coglet/predictions")
# Seconds. Cog makes them just before it calls `run`; in those of a running prediction it wants to find them.
SWEEP_AFTER = 60.0
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


def with_files(run: Callable[..., Any], settings: UrlSettings, most: int) -> Callable[..., Any]:
    """`run`, called with files where its caller has URLs.

    Args:
        run: a bound method of which some inputs are annotated with cog.Path, or with a list of it.
        most: pictures in a list. A longer one is handed to `run` as it is, which refuses it.

    Returns:
        A function of the same inputs that takes http, https and data URLs, and files, for those. The files that it
        makes are gone when it returns. It raises ValueError if one of the inputs is neither, or cannot be downloaded.
    """
    names = [name for name, kind in typing.get_type_hints(run).items() if name != "return" and takes_files(kind)]

    @functools.wraps(run)
    def run_with_files(**inputs: Any) -> Any:
        sweep()
        # Its making and its end are what scripts/healthcheck knows a run's beginning and end by.
        with tempfile.TemporaryDirectory(prefix="cascade-inputs-") as folder:
            given = {name: inputs[name] for name in names if inputs.get(name) is not None}
            return run(**{**inputs, **fetch(given, Path(folder), settings, most)})

    run_with_files.__annotations__ = {
        name: str if name in names else kind for name, kind in run.__annotations__.items()
    }
    return run_with_files


def takes_files(kind: Any) -> bool:
    """Whether a type is cog.Path, or has it in it."""
    return kind is cog.Path or any(takes_files(one) for one in typing.get_args(kind))


def fetch(inputs: dict[str, Any], folder: Path, settings: UrlSettings, most: int) -> dict[str, Any]:
    """Inputs with files in the place of URLs: all downloaded together, into a folder.

    Raises:
        ValueError: one is neither file nor URL, cannot be decoded, or cannot be downloaded. The rest is then stopped.
    """
    fetched = {name: value for name, value in inputs.items() if not isinstance(value, list) or len(value) <= most}
    sources = {}
    for name, value in fetched.items():
        if isinstance(value, list):
            fetched[name] = list(value)
            sources |= {(name, i): one for i, one in enumerate(value)}
        else:
            sources[name, None] = value
    files, urls = {}, {}
    for i, ((name, place), source) in enumerate(sources.items()):
        label = name if place is None else f"Picture {place + 1} of {name}"
        target = cog.Path(folder / str(i))
        scheme = str(source)[:6].partition(":")[0].lower()
        if isinstance(source, Path):
            files[name, place] = source
        elif isinstance(source, str) and scheme == "data":
            target.write_bytes(decode(label, source))
            files[name, place] = target
        elif isinstance(source, str) and scheme in ("http", "https"):
            files[name, place] = target
            urls[label] = (source, target)
        else:
            raise ValueError(f"{label} is {reprlib.repr(source)}; it must be an http, https or data URL of a picture.")
    download_all(urls, settings)
    for (name, place), file in files.items():
        if place is None:
            fetched[name] = file
        else:
            fetched[name][place] = file
    return {**inputs, **fetched}


def decode(label: str, url: str) -> bytes:
    """What a data URL holds."""
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.read()
    except (ValueError, OSError):
        raise ValueError(f"{label} is a data URL that cannot be decoded.") from None


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
                    raise ValueError(f"{label} could not be downloaded from {host_of(url)}: {error}.") from None
            if server.has_ended():
                raise ValueError("The server is shutting down; no more is downloaded.")


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


def sweep() -> None:
    """Remove the empty folders of former predictions: Cog makes three for each, and they would use up the inodes."""
    with contextlib.suppress(OSError), os.scandir(COG_FOLDERS) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and time.time() - entry.stat().st_mtime > SWEEP_AFTER:
                    for folder in ("inputs", "outputs", "."):
                        os.rmdir(Path(entry.path) / folder)
