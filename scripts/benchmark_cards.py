"""How the published networks run on cards with less memory, on this GPU: ``python -m scripts.benchmark_cards``.

Networks have random weights, on which time and memory do not depend. For each size of a card, a process of its own may use so
much of this GPU's memory and no more, and chooses the memory mode by itself. Writes a table in Markdown. Its times are this
GPU's: a smaller card also computes more slowly, and reads weights more slowly from the host. Needs 12 GB of disk while it runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cascade import Cascade, Request
from scripts.contenders import PROMPT
from scripts.environment import ROOT
from scripts.stand_ins import NEEDED, write_stand_ins
from serving.peak_memory import peak_memory, reset_peak_memory

CARDS = (24, 16, 12, 8, 6)
GIB = 2**30
# 1 GB of a card and a little of the rest are taken by the driver, by CUDA and by other programs.
USABLE = 0.94


def measure(folder: Path, card: int, runs: int, sizes: list[int]) -> dict[str, Any]:
    """Pictures on a card of so many GiB, in this process.

    Returns:
        ``mode``; and by size in pixels ``seconds``, the median, and ``peak``, in GiB, both None where memory does not suffice.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(USABLE * card * GIB / total)
    cascade = Cascade.load(folder, "cuda", torch.bfloat16)
    found: dict[str, Any] = {"mode": cascade.runner.description, "seconds": {}, "peak": {}}
    for size in sizes:
        request = Request(PROMPT, width=size, height=size)
        times: list[float] = []
        try:
            for _ in range(runs + 2):
                reset_peak_memory(cascade.device)
                start = time.perf_counter()
                cascade.generate(request)
                times.append(time.perf_counter() - start)
            found["seconds"][size] = statistics.median(times[2:])
            found["peak"][size] = peak_memory(cascade.device) / GIB
        except RuntimeError as error:
            sys.stderr.write(f"{card} GiB, {size} pixels: {error}\n")
            found["seconds"][size] = found["peak"][size] = None
    return found


def table(results: dict[int, dict[str, Any]], head: str) -> str:
    """What `measure` found for each card, as a Markdown table below a line."""
    sizes = list(next(iter(results.values()))["seconds"])
    titles = ["card", "mode", *(f"{size}x{size}, s | peak, GiB" for size in sizes)]
    lines = [head, "", f"| {' | '.join(titles)} |", f"|---|---|{'---:|---:|' * len(sizes)}"]
    for card, found in results.items():
        cells = [f"{card} GiB", found["mode"]]
        for size in sizes:
            seconds, peak = found["seconds"][size], found["peak"][size]
            cells += ["does not fit", ""] if seconds is None else [f"{seconds:.2f}", f"{peak:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_process(folder: Path, card: int, runs: int, sizes: list[int]) -> dict[str, Any]:
    """`measure` in a process of its own, because a limit on memory and what torch keeps of it last as long as the process."""
    command = [sys.executable, "-m", "scripts.benchmark_cards", "--runs", str(runs), "--sizes", *map(str, sizes)]
    done = subprocess.run(
        [*command, "--measure", str(card), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="timed pictures, after two others (default: %(default)s)")
    parser.add_argument("--cards", nargs="*", type=int, default=CARDS, help="sizes in GiB (default: 24 16 12 8 6)")
    parser.add_argument("--sizes", nargs="*", type=int, default=[1024, 2048], help="of pictures (default: 1024 2048)")
    parser.add_argument("--weights", type=Path, help="networks that are there already")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a card and the folder: what `in_process` runs
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure")
    if options.measure:
        card, folder = options.measure
        sys.stdout.write(json.dumps(measure(Path(folder), int(card), options.runs, options.sizes)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.weights or Path(name)
        if options.weights is None:
            write_stand_ins(folder, "cuda", NEEDED)
            torch.cuda.empty_cache()
        results = {card: in_process(folder, card, options.runs, options.sizes) for card in options.cards}
    head = f"{torch.cuda.get_device_name()}, limited to {USABLE:.0%} of each card's memory; medians of {options.runs} runs."
    print(table(results, head))


if __name__ == "__main__":
    main()
