"""What LoRAs cost at the published size, on this GPU: ``python -m scripts.benchmark_loras``.

Networks have random weights, on which time and memory do not depend, and so have two LoRAs of rank 64 of all Linears of Stage
C. In each memory mode, in a process of its own, requests with the one LoRA, without, and with the other alternate. Writes a
table in Markdown. Needs 13 GB of disk while it runs.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade import Cascade, Lora, Request
from scripts.contenders import PROMPT
from scripts.environment import ROOT
from scripts.stand_ins import NEEDED, shapes_of, write_lora, write_stand_ins
from scripts.timing import percent_more
from serving.peak_memory import peak_memory, reset_peak_memory

MODES = ("resident", "offload", "stream")
RANK = 64
LORAS = "loras"  # the folder of the LoRAs, in that of the networks
PICTURE = {"width": 1024, "height": 1024, "guidance_scale_decoder": 1.0}
# Of which nearly all is the change.
SHORT = {**PICTURE, "steps_prior": 1, "steps_decoder": 1}
CHANGES = {"first": "from the base", "other": "from another", "none": "to the base"}
GIB = 2**30


def own_memory() -> int:
    """Bytes of this process that are in memory and its own: not pages of files."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def measure(
    cascade: Cascade,
    paths: Sequence[Path],
    runs: int,
    picture: dict[str, Any] = PICTURE,
    short: dict[str, Any] = SHORT,
) -> dict[str, Any]:
    """Time changes of LoRAs, and pictures with and without one, in turn.

    A change is what a short request with other LoRAs takes longer than one with the same: files read, weights merged and, in
    `offload` and `stream`, uploaded.

    Args:
        cascade: the model.
        paths: of two LoRAs.
        runs: after one that does not count.
        picture, short: options of a request for a picture, and of one whose time is nearly all a change.

    Returns:
        Seconds of each run: "picture", "picture with", and by `CHANGES`; bytes by which the GPU's peak and the memory that
        this process holds at the end exceed those without LoRAs: "gpu", "host".
    """

    def seconds(loras: list[Lora], options: dict[str, Any]) -> float:
        start = time.perf_counter()
        cascade.generate(Request(PROMPT, loras=loras, **options))
        return time.perf_counter() - start

    one, other = ([Lora(path)] for path in paths)
    for options in (picture, short, picture, short):
        seconds([], options)
    reset_peak_memory(cascade.device)
    usual = statistics.median(seconds([], short) for _ in range(runs))
    peak, host = peak_memory(cascade.device), own_memory()
    found: dict[str, Any] = {name: [] for name in ("picture", "picture with", *CHANGES)}
    for _ in range(runs + 1):
        found["other"].append(seconds(one, short) - usual)
        found["picture with"].append(seconds(one, picture))
        found["none"].append(seconds([], short) - usual)
        found["picture"].append(seconds([], picture))
        found["first"].append(seconds(other, short) - usual)
    found = {name: each[1:] for name, each in found.items()}
    seconds([], short)
    return found | {"gpu": peak_memory(cascade.device) - peak, "host": own_memory() - host}


def table(results: dict[str, dict[str, Any]], head: str) -> str:
    """What `measure` found in each memory mode, as a Markdown table below a line."""
    titles = [
        "memory mode",
        *(f"change {text}, s" for text in CHANGES.values()),
        "picture, s",
        "with a LoRA, s",
        "more, % (quartiles)",
        "GPU peak, GiB more",
        "host afterwards, GiB more",
    ]
    lines = [head, "", f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for mode, found in results.items():
        low, middle, high = percent_more(found["picture with"], found["picture"])
        cells = [
            mode,
            *(f"{statistics.median(found[name]):.2f}" for name in CHANGES),
            *(f"{statistics.median(found[name]):.3f}" for name in ("picture", "picture with")),
            f"{middle:+.1f} ({low:+.1f} to {high:+.1f})",
            *(f"{found[name] / GIB:+.2f}" for name in ("gpu", "host")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_process(mode: str, folder: Path, runs: int) -> dict[str, Any]:
    """`measure` in a memory mode, in a process of its own, whose memory no other mode has used."""
    command = [sys.executable, "-m", "scripts.benchmark_loras", "--runs", str(runs), "--measure", mode, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each kind (default: %(default)s)")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES, help="memory modes (default: all)")
    parser.add_argument("--folder", type=Path, help="where the networks are kept (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a mode and the folder: what `in_process` runs
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure")
    if options.measure:
        mode, folder = options.measure[0], Path(options.measure[1])
        loaded = Cascade.load(folder, "cuda", torch.bfloat16, memory=mode)
        sys.stdout.write(json.dumps(measure(loaded, sorted((folder / LORAS).iterdir()), options.runs)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_stand_ins(folder, "cuda", NEEDED)
        torch.cuda.empty_cache()
        (folder / LORAS).mkdir()
        for seed in range(2):
            write_lora(folder / LORAS / f"{seed}.safetensors", shapes_of(folder), RANK, seed)
        results = {mode: in_process(mode, folder, options.runs) for mode in options.modes}
    head = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, rank {RANK}, 1024x1024; "
        f"medians of {options.runs} runs."
    )
    print(table(results, head))


if __name__ == "__main__":
    main()
