"""Spreads the shards of a run over workers, on Ray Data: a pool of actors, one a GPU, each with a loaded `Maker`.

Ray starts an actor again that died, and its shard with it. It does not start a task again that raised an exception: then the
run stops.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Read when Ray is imported: nothing is sent to its makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import ray.data
import torch
from ray.actor import ActorHandle

from bulk.maker import GpuLostError, Maker
from bulk.run import RunError
from bulk.tally import Done, Tally

ROOT = Path(__file__).resolve().parent.parent
# How often a shard may be begun. A worker may be killed, but a row that kills each worker must not go on for ever.
ATTEMPTS = 3
# Bytes of Ray's own store, which holds shards' numbers only.
STORE = 100_000_000
# How often Ray's start is tried.
STARTS = 3
# Seconds between looks at what the workers tell.
LOOK = 1.0


class ShardActor:
    """What Ray Data calls with each shard's number, in a process that has a GPU, or some threads, to itself.

    Args:
        output: URL of the run's folder.
        tally: actor of `Tally`.
        threads: on a CPU.
    """

    def __init__(self, output: str, tally: ActorHandle, threads: int) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("serving.service").setLevel(logging.INFO)  # which model, and where
        torch.set_num_threads(threads)
        self.maker = Maker(output)
        self.tally = tally

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"].tolist():
            attempts = ray.get(self.tally.begin.remote(shard))
            if attempts > ATTEMPTS:
                raise RunError(f"Shard {shard} was begun {ATTEMPTS} times, and each time the worker died.")
            try:
                self.maker.make(shard, lambda *done, shard=shard: self.tally.report.remote(shard, *done))
            except GpuLostError as error:
                logging.getLogger(__name__).error("%s Another process takes over.", error)
                os._exit(1)  # Ray starts another one
            ray.get(self.tally.finish.remote(shard, self.maker.run.rows_in(shard)))
        return {"shard": batch["shard"]}


@contextlib.contextmanager
def joined(address: str | None, workers: int | None) -> Iterator[None]:
    """A context in which Ray runs: the cluster at `address`, or one of this machine alone."""
    if address is None:
        # Its processes inherit this one's variables. They find this folder as this one does.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        cores = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, workers or 1)
        options: dict[str, Any] = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE}
    else:
        # A cluster's processes were not started by this one, and have other variables.
        variables = {name: value for name, value in os.environ.items() if name.startswith("CASCADE_")}
        options = {"runtime_env": {"env_vars": {**variables, "PYTHONPATH": str(ROOT)}}}
    start(address=address or "local", logging_level=logging.ERROR, **options)
    try:
        yield
    finally:
        ray.shutdown()


def start(**options: Any) -> None:
    """Start or join Ray. It gives its processes 30 s to start, which a busy machine may exceed: then it is tried again.

    options: of `ray.init`.

    Raises:
        RunError: Ray does not start, or there is no cluster.
    """
    for left in reversed(range(STARTS)):
        try:
            ray.init(**options)
            return
        except Exception as error:  # of no class of Ray's
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise RunError(f"Ray did not start: {error}") from error


def make(
    output: str,
    shards: Sequence[int],
    *,
    address: str | None = None,
    workers: int | None = None,
    on_progress: Callable[[Done], None] = lambda _: None,
) -> Done:
    """Make shards, each on whichever worker is free.

    Args:
        output: URL of the run's folder.
        shards: their numbers.
        address: of a Ray cluster that runs, as for `ray.init`; None: Ray is started on this machine, and ended.
        workers: how many; None: one for each GPU of the cluster, or one on its CPUs if it has none.
        on_progress: called about every second.

    Raises:
        RunError: Ray does not start, there are not as many GPUs or cores as workers, or a worker raised an exception.
    """
    with joined(address, workers):
        needed, count, threads = resources(ray.cluster_resources(), workers)
        tally = ray.remote(Tally).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        quiet()
        dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        pool = ray.data.ActorPoolStrategy(size=min(count, len(shards)), max_tasks_in_flight_per_actor=1)
        given = {"output": output, "tally": tally, "threads": threads}
        dataset = dataset.map_batches(ShardActor, batch_size=1, compute=pool, fn_constructor_kwargs=given, **needed)
        try:
            with watched(tally, on_progress):
                for _ in dataset.iter_rows():
                    pass
        except ray.exceptions.RayError as error:
            raise RunError(f"A worker stopped: {reason(error)}") from error
        return ray.get(tally.done.remote())


def resources(there: dict[str, float], workers: int | None) -> tuple[dict[str, float], int, int]:
    """What Ray gives each worker, how many there are, and the threads of each.

    Args:
        there: the cluster's resources.
        workers: how many; None: one for each GPU, or one.

    Raises:
        RunError: there are not as many GPUs or cores.
    """
    gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    on_gpus = gpus > 0 and os.environ.get("CASCADE_DEVICE") != "cpu"
    most, what = (gpus, "GPUs") if on_gpus else (cores, "cores")
    count = workers or (gpus if on_gpus else 1)
    if count > most:
        raise RunError(f"--workers is {count}; there are {most} {what}, so it must be from 1 to {most}.")
    threads = 1 if on_gpus else cores // count
    return ({"num_gpus": 1, "num_cpus": 0} if on_gpus else {"num_cpus": threads}), count, threads


def reason(error: BaseException) -> str:
    """What the worker said, without the tracebacks around it."""
    lines = [line for line in str(error).splitlines() if line and not line[0].isspace()]
    return lines[-1] if lines else type(error).__name__


def quiet() -> None:
    """Say nothing of Ray Data's own plans and progress; the caller shows progress."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextlib.contextmanager
def watched(tally: ActorHandle, on_progress: Callable[[Done], None]) -> Iterator[None]:
    """A context in which `on_progress` is called every `LOOK` seconds, on a thread."""
    end = threading.Event()

    def look() -> None:
        while not end.wait(LOOK):
            with contextlib.suppress(ray.exceptions.RayError):
                on_progress(ray.get(tally.done.remote(), timeout=10 * LOOK))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
