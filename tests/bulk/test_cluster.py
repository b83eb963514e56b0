"""Ray itself: a run whose worker and then whose driver is killed has what a run in one process makes.

Imports of Ray stand in functions: whoever runs other tests reads this file, too.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from bulk.run import RunError
from bulk.tally import Done, Tally
from tests.bulk.tables import SMALL, lines_of, make_run, pictures_of, write_table
from tests.readme import ROOT

# Seconds, after which a test ends that would never end. On a machine with ten times as many processes as cores, a worker's
# start alone took eight minutes.
PATIENCE = 3600
# Processes of Ray that try for 60 s to tell the head that it is dead, and only then end.
AGENTS = ("DashboardAgent", "RuntimeEnvAgent")
# Rows that take a while each, so that a worker can be killed in the middle of a shard.
SLOW = {**SMALL, "steps_prior": 20, "steps_decoder": 20}
ROWS: list[dict[str, Any] | str] = [
    {
        "prompt": f"picture {place}",
        "id": place,
        **SLOW,
        "num_images": 1 + place % 2,
        "width": 64 + 64 * (place % 3 == 0),
    }
    for place in range(22)
]
ROWS[5:5] = ["no", {"prompt": "a cat", "width": 1, "id": -1}]


class Driver:
    """A process of scripts/generate-many.

    Args:
        folder: has the table, and gets the output.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        command = [sys.executable, ROOT / "scripts" / "generate-many", "table.jsonl", "out", "--keep", "id"]
        options = ["--workers", "2", "--shard", "4", "--batch", "2"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*command, *options], cwd=folder, stdout=log, stderr=log)
        self.family: list[psutil.Process] = []

    def workers(self) -> list[psutil.Process]:
        """The processes that make shards now."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in self.family if titled(one, "ShardActor")]

    def wait_for(self, found: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            if result := found():
                return result
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())


def titled(process: psutil.Process, word: str) -> bool:
    try:
        return word in " ".join(process.cmdline())
    except psutil.Error:
        return False


def runs(process: psutil.Process) -> bool:
    """Whether it has not ended; nobody may have asked how it ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started(folder: Path) -> Iterator[Driver]:
    """A driver; at the end, none of its processes is left but Ray's agents."""
    driver = Driver(folder)
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.wait()
        left = await_ends([one for one in driver.family if not any(titled(one, agent) for agent in AGENTS)])
    assert left == [], "Ray's processes end with the driver"


def await_ends(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that did not end by themselves, and are killed."""
    end = time.monotonic() + PATIENCE
    while (left := [one for one in processes if runs(one)]) and time.monotonic() < end:
        time.sleep(0.1)
    for one in left:
        one.kill()
    return left


@pytest.fixture(scope="session")
def dying() -> Iterator[list[psutil.Process]]:
    """Processes that end by themselves, but not soon. This process runs its other tests before it waits for them."""
    processes: list[psutil.Process] = []
    yield processes
    assert await_ends(processes) == [], "nor is an agent of a killed driver left"


@pytest.mark.slow
def test_kills_lose_nothing_and_make_nothing_twice(
    tmp_path: Path, model_folder: Path, dying: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    monkeypatch.setenv("CASCADE_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder, done = tmp_path / "ray", tmp_path / "ray" / "out"
    folder.mkdir()
    write_table(folder / "table.jsonl", ROWS)

    with started(folder) as killed:
        killed.wait_for(lambda: list(done.glob("*_stats.json")))
        (victim, *_) = killed.wait_for(killed.workers)
        victim.send_signal(signal.SIGKILL)
        before = len(list(done.glob("*_stats.json")))
        killed.wait_for(lambda: len(list(done.glob("*_stats.json"))) > before)
        killed.workers()
        os.kill(killed.process.pid, signal.SIGKILL)
    made = {file.name: file.stat().st_mtime_ns for file in done.glob("0*")}
    whole = {file.name[:5] for file in done.glob("*_stats.json")}
    assert 2 <= len(whole) < 6
    dying.extend(killed.family)
    with started(folder) as driver:
        assert driver.process.wait(PATIENCE) == 0, driver.log.read_text()

    make_run(tmp_path / "one", ROWS, keep=("id",))
    assert pictures_of(done) == pictures_of(tmp_path / "one" / "out")
    same = [{**line, "seconds": 0} for line in lines_of(done)]
    assert same == [{**line, "seconds": 0} for line in lines_of(tmp_path / "one" / "out")]
    assert [line["id"] for line in same if line["index"] == 0] == [*range(5), None, -1, *range(5, 22)]
    again = {file.name: file.stat().st_mtime_ns for file in done.glob("0*")}
    assert {name: again[name] for name in made if name[:5] in whole} == {
        name: made[name] for name in made if name[:5] in whole
    }, "what is done is left as it is"
    assert {file.name for file in done.iterdir()} == {*again, "run.json"}
    assert "pictures/s" in driver.log.read_text()


@pytest.mark.slow
def test_what_is_counted_survives_a_worker() -> None:
    from bulk.cluster import ATTEMPTS

    tally = Tally()
    assert tally.begin(3) == 1
    tally.report(3, 2, 2, 0)
    tally.report(3, 4, 3, 1)
    tally.begin(4)
    tally.report(4, 1, 1, 0)
    assert tally.done() == Done(5, 4, 1)
    assert tally.begin(3) == 2, "its worker died"
    assert tally.done() == Done(1, 1, 0)
    tally.report(3, 4, 3, 1)
    tally.finish(3, 5)
    assert tally.done() == Done(6, 4, 1)
    assert tally.begin(3) == 1
    assert ATTEMPTS > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "workers", "device", "found"),
    [
        ({"CPU": 8.0}, None, "auto", ({"num_cpus": 8}, 1, 8)),
        ({"CPU": 8.0}, 3, "auto", ({"num_cpus": 2}, 3, 2)),
        ({"CPU": 64.0, "GPU": 4.0}, None, "auto", ({"num_gpus": 1, "num_cpus": 0}, 4, 1)),
        ({"CPU": 64.0, "GPU": 4.0}, 2, "auto", ({"num_gpus": 1, "num_cpus": 0}, 2, 1)),
        ({"CPU": 64.0, "GPU": 4.0}, None, "cpu", ({"num_cpus": 64}, 1, 64)),
    ],
)
def test_one_worker_a_gpu(
    there: dict[str, float], workers: int | None, device: str, found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bulk.cluster import resources

    monkeypatch.setenv("CASCADE_DEVICE", device)
    assert resources(there, workers) == found


def test_more_workers_than_there_are_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from bulk.cluster import resources

    monkeypatch.delenv("CASCADE_DEVICE", raising=False)
    with pytest.raises(RunError, match=r"^--workers is 5; there are 4 GPUs, so it must be from 1 to 4\.$"):
        resources({"CPU": 8.0, "GPU": 4.0}, 5)


def test_a_reason_is_the_last_sentence() -> None:
    from bulk.cluster import reason

    text = (
        '\x1b[36mray::MapWorker()\x1b[39m\n  File "maker.py", line 1\nOSError: [Errno 28] No space left on device\n\n'
    )
    assert reason(RuntimeError(text)) == "OSError: [Errno 28] No space left on device"
    assert reason(RuntimeError("")) == "RuntimeError"
