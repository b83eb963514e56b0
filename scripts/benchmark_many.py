"""Throughput of several GPUs against one alone, in one run: ``python -m scripts.benchmark_many --gpus 4``.

Each GPU has one process with a `bulk.maker.Maker`, which is what each actor of scripts/generate-many has; Ray is not needed.
The networks have the published sizes and random weights, unless --weights names a model folder. First, one process makes its
shards while the others wait; then all make theirs. Time is taken from the moment when all are ready to when the last one has
put its last shard into the output's folder. Without --gpus, the processes run on the CPU.
"""

import argparse
import json
import os
import queue
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from bulk import run as runs
from bulk.run import Run
from bulk.storage import Folder
from bulk.table import Table
from scripts.benchmarking import matmul_rate

OBJECTS = ("a lighthouse", "a ship", "an old house", "a forest", "a horse", "a market")
PLACES = ("on a cliff above the sea", "in the evening", "in the rain", "in the mountains", "under a full moon")


@dataclass(frozen=True)
class Work:
    """What each process makes.

    Attributes:
        shards: it makes while the time is taken.
        shard: rows of each.
        batch: pictures that are made together.
    """

    shards: int
    shard: int
    batch: int


def write_run(folder: Path, work: Work, processes: int, inputs: dict[str, Any]) -> Folder:
    """Write a table, and begin its run. Each process has a shard for warming up, those of the run alone and those of all."""
    count = processes * (1 + 2 * work.shards) * work.shard
    prompts = (f"{OBJECTS[row % len(OBJECTS)]} {PLACES[row % len(PLACES)]}, {row}" for row in range(count))
    file = folder / "table.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': prompt, **inputs})}\n" for prompt in prompts))
    table, output = Table(str(file)), Folder(str(folder / "out"))
    run = Run(table.sha256(), count, work.shard, work.batch, 0, {}, str(folder), {})
    runs.begin(output, run, table)
    return output


def serve(number: int, output: str, orders: Any, answers: Any) -> None:
    """A process: loads a model, then makes the shards that it is told to. Answers with its number and its seconds."""
    from bulk.maker import Maker

    maker = Maker(output)
    answers.put((number, 0.0))
    while (shards := orders.get()) is not None:
        start = time.perf_counter()
        for shard in shards:
            maker.make(shard)
        answers.put((number, time.perf_counter() - start))


class Pool:
    """Processes, one for each GPU, that make shards."""

    def __init__(self, count: int, output: str, on_gpus: bool, weights: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.answers = context.Queue()
        self.orders = [context.Queue() for _ in range(count)]
        self.processes = []
        os.environ["CASCADE_WEIGHTS"] = str(weights)
        os.environ["CASCADE_DEVICE"] = "cuda" if on_gpus else "cpu"
        for number, orders in enumerate(self.orders):
            if on_gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = visible(number)
            else:
                os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
            process = context.Process(target=serve, args=(number, output, orders, self.answers), daemon=True)
            process.start()
            self.processes.append(process)
        self._wait(count)

    def make(self, shards: dict[int, list[int]]) -> tuple[float, list[float]]:
        """Make shards, by the process's number. Returns the seconds of all, and of each process."""
        start = time.perf_counter()
        for number, given in shards.items():
            self.orders[number].put(given)
        each = self._wait(len(shards))
        return time.perf_counter() - start, each

    def close(self) -> None:
        for orders in self.orders:
            orders.put(None)
        for process in self.processes:
            process.join()

    def _wait(self, count: int) -> list[float]:
        found: dict[int, float] = {}
        while len(found) < count:
            try:
                number, seconds = self.answers.get(timeout=1)
                found[number] = seconds
            except queue.Empty:
                if any(process.exitcode for process in self.processes):
                    sys.exit("A process ended; the messages above say why.")
        return [found[number] for number in sorted(found)]


VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "")


def visible(number: int) -> str:
    """The name of a GPU among those that this process was given."""
    return VISIBLE.split(",")[number] if VISIBLE else str(number)


def measure(pool: Pool, work: Work, processes: int, name: str) -> dict[str, Any]:
    """Warm up, then time one process alone and all together."""
    each = [list(range(number, processes * (1 + 2 * work.shards), processes)) for number in range(processes)]
    warm, _ = pool.make({number: each[number][:1] for number in range(processes)})
    pictures = work.shards * work.shard
    alone, _ = pool.make({0: each[0][1 : 1 + work.shards]})
    together, seconds = pool.make({number: each[number][1 + work.shards :] for number in range(processes)})
    found = {
        "device": name,
        "processes": processes,
        "pictures_each": pictures,
        "batch": work.batch,
        "warming_up": warm,
        "alone": pictures / alone,
        "together": processes * pictures / together,
        "seconds_each": seconds,
    }
    return {**found, "ratio": found["together"] / (processes * found["alone"])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_many", description="Time several GPUs, and one.")
    parser.add_argument("--gpus", type=int, default=0, help="processes, one a GPU (default: none, but --workers)")
    parser.add_argument("--workers", type=int, default=2, help="processes on the CPU (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pictures made together (default: %(default)s)")
    parser.add_argument("--shard", type=int, default=16, help="rows of a shard (default: %(default)s)")
    parser.add_argument("--shards", type=int, default=5, help="of each process, timed (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs=2, default=(20, 10), help="of Stages C and B (default: 20 10)")
    parser.add_argument("--weights", type=Path, help="a model folder (default: random weights of the published sizes)")
    parser.add_argument(
        "--folder", type=Path, help="for 18 GB of stand-ins and the pictures (default: a temporary one)"
    )
    options = parser.parse_args()
    if options.gpus > torch.cuda.device_count():
        parser.error(f"--gpus is {options.gpus}; there are {torch.cuda.device_count()} GPUs")
    processes = options.gpus or options.workers
    name = torch.cuda.get_device_name() if options.gpus else "CPU"
    work = Work(options.shards, options.shard, options.batch)
    inputs = {
        "width": options.size,
        "height": options.size,
        "steps_prior": options.steps[0],
        "steps_decoder": options.steps[1],
        "guidance_scale_prior": 4.0,
        "guidance_scale_decoder": 1.0,
    }
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        weights = options.weights
        if weights is None:
            from scripts.stand_ins import write_stand_ins

            weights = Path(folder) / "weights"
            write_stand_ins(weights, "cuda" if options.gpus else "cpu")
            # The processes do not need it; it would take memory of the first GPU.
            torch.cuda.empty_cache()
        sys.stderr.write(f"Weights are there after {time.perf_counter() - begun:.0f} s.\n")
        rate = matmul_rate() if options.gpus else None
        output = write_run(Path(folder), work, processes, inputs)
        pool = Pool(processes, output.url, bool(options.gpus), weights)
        sys.stderr.write(f"{processes} processes are ready after {time.perf_counter() - begun:.0f} s.\n")
        found = {**measure(pool, work, processes, name), "size": options.size, "matmul_tflops": rate}
        pool.close()
        shutil.rmtree(Path(folder) / "out")
    print(json.dumps(found))
    print(
        f"{name}, {options.size}x{options.size}, batches of {work.batch}: one alone {found['alone']:.3f} pictures/s, "
        f"{processes} together {found['together']:.3f}, {found['ratio']:.3f} of {processes} times one alone."
    )


if __name__ == "__main__":
    main()
