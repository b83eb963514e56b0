"""What strangers send to keep the server busy, or to fill its memory: bounded in time, in memory and in what is logged."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from tests.http.serving import ANSWER, SMALL, Server, data_url, wait_for
from tests.images.files import fixture

Image.init()  # the names of all formats
# Lossless, of 34 bytes; lossless with transparency, the most that a decoder holds; and AVIF.
MANY_PIXELS = [
    data_url(fixture("64-megapixels.webp"), "WEBP"),
    data_url(fixture("64-megapixels-alpha.webp.gz"), "WEBP"),
    data_url(fixture("64-megapixels.avif.gz"), "AVIF"),
]
SCANS = fixture("many-scans.jpg.gz")
MANY_SCANS = data_url(SCANS, "JPEG")
# As many as are let through: 15 s of a processor.
SLOW_SCANS = data_url(b"\xff\xda".join(SCANS.split(b"\xff\xda")[:101]), "JPEG")


@contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """A list that gets the resident bytes of the worker and the process that decodes, ten times a second."""
    sizes: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            try:
                sizes.append(worker_memory(server))
            except psutil.NoSuchProcess:  # one ended meanwhile
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        over.set()
        thread.join()


def failure(answer: Any) -> str:
    assert answer.status_code == 200, answer.text[:1000]
    prediction = answer.json()
    assert prediction["status"] == "failed", answer.text[:1000]
    return prediction["error"].partition("InputError: ")[2]


def decoder_of(server: Server) -> psutil.Process | None:
    """The process that decodes pictures, if it has been started."""
    below = server.process.children(recursive=True)
    return next((process for process in below if "cascade.images.child" in str(process.cmdline())), None)


def processes(server: Server) -> list[psutil.Process]:
    return [server.process, *server.process.children(recursive=True)]


def worker_memory(server: Server) -> int:
    """Resident bytes of the worker and the process that decodes.

    Until it becomes that, by exec, a process that was just started shows the worker's own memory.
    """
    (worker,) = (process for process in processes(server) if "_run_worker" in str(process.cmdline()))
    decoder = decoder_of(server)
    return worker.memory_info().rss + (decoder.memory_info().rss if decoder else 0)


def cpu_seconds(server: Server) -> float:
    """Of the server and its worker. The time of the clock depends on what else the machine does."""
    return sum(sum(process.cpu_times()[:2]) for process in processes(server))


@pytest.mark.parametrize(
    ("name", "characters", "times"), [("prompt", 4_000_000, 8), ("negative_prompt", 50_000_000, 6)]
)
def test_a_prompt_of_megabytes(server: Server, name: str, characters: int, times: int) -> None:
    """Refused by its length, before it costs anything but its way through Cog: 0.5 s of both processes at 50 MB."""
    server.predict(**SMALL)
    inputs = {**SMALL, name: "a" * characters}
    memory = []
    for _ in range(times):
        server.wait_until("READY")
        start = cpu_seconds(server)
        answer = server.post(inputs)
        assert failure(answer) == f"{name} has {characters:,} characters; it may have at most 10,000."
        assert cpu_seconds(server) - start < 2
        assert len(answer.content) < 1000
        memory.append(worker_memory(server) >> 20)
    # The first ones fill what the allocator keeps: from 4 MB on, 824, 831, 839, 847, 854 and from then on at most 855 MB.
    # Of 50 MB, a single one that is kept shows.
    assert memory[-1] - memory[4] < 15, memory
    server.predict(**SMALL)


def test_a_long_prompt_is_quoted_in_part(server: Server) -> None:
    prediction = server.predict(**SMALL, prompt="word " * 1900)
    (line,) = [line for line in prediction["logs"].splitlines() if "left out" in line]
    assert len(line) < 300


def test_nine_pictures_of_64_megapixels_in_one_request(server: Server) -> None:
    """Each would take 1.2 GB, were it read by Pillow in the worker."""
    small, *_ = MANY_PIXELS
    images = {"image": small, "image_prompts": [small] * 4, "control_images": [small] * 4}
    server.predict(**SMALL, image=data_url(Image.new("RGB", (64, 64))))
    server.wait_until("READY")
    before = worker_memory(server)
    with watched(server) as sizes:
        answer = requests.post(f"{server.url}/predictions", json={"input": {**SMALL, **images}}, timeout=4 * ANSWER)
    assert answer.json()["status"] == "succeeded", answer.text
    assert max(sizes) < 1.5e9
    server.wait_until("READY")
    assert worker_memory(server) - before < 60e6


def test_pictures_of_64_megapixels_of_each_kind(server: Server) -> None:
    """The process that decodes takes at most 400 MB besides a picture's own 192 MB."""
    image, transparent, avif = MANY_PIXELS
    server.wait_until("READY")
    before = worker_memory(server)
    with watched(server) as sizes:
        server.predict(**SMALL, image=image, image_prompts=[transparent, avif])
    server.wait_until("READY")
    grown = worker_memory(server) - before
    assert max(sizes) - before < 600e6
    assert grown < 60e6


def test_a_picture_of_many_scans(server: Server) -> None:
    """506 progressive scans of 63 megapixels, in 295 kB, would take 87 s."""
    server.wait_until("READY")
    start = time.monotonic()
    assert failure(server.post({**SMALL, "image": MANY_SCANS})) == "image has 506 scans; 100 are the limit."
    assert time.monotonic() - start < 10
    server.predict(**SMALL)


def test_a_cancel_is_heard_while_a_picture_is_decoded(server: Server) -> None:
    server.wait_until("READY")
    server.put("many-scans", {**SMALL, "image": SLOW_SCANS}, {"Prefer": "respond-async"})
    decoder = wait_for(lambda: decoder_of(server), ANSWER, "the process that decodes")
    wait_for(lambda: sum(decoder.cpu_times()[:2]) > 0.5, ANSWER, "half a second of work")
    start = time.monotonic()
    server.cancel("many-scans")
    server.wait_until("READY")
    assert time.monotonic() - start < 2
    assert not decoder.is_running()
    server.predict(**SMALL)
