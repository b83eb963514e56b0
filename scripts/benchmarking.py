"""The command line of ``scripts/benchmark``: times contenders on this GPU, and writes a table and a plot."""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scripts.contenders import CONTENDERS, steps_of
from scripts.environment import ROOT
from scripts.stand_ins import write_stand_ins

# 10**12 operations per forward of one sample at 1024x1024, in matrix products and convolutions: of Stages C and B, by
# whether they are lite; of Stage A.
WORK = {False: (4.08, 6.17), True: (1.17, 2.22)}
WORK_STAGE_A = 2.17


def case(name: str, **others: Any) -> dict[str, Any]:
    """What a contender makes. `image` is None, or what an input image of noise is used as: "control" or "start"; `speed` and
    `compression` are those of a `Request`."""
    usual = {"size": 1024, "batch": 1, "decoder_guidance": 0.0, "lite": False, "image": None}
    usual |= {"speed": "exact", "compression": 42.67}
    return {"name": name, **usual, **others}


CASES = [
    case("batch 1"),
    case("batch 4", batch=4),
    case("authors' guidance", decoder_guidance=1.1),
    case("lite + lite", lite=True),
]
GROWTH = [
    *(case(f"{size} pixels", size=size) for size in (512, 768, 1280, 1536, 2048)),
    *(case(f"batch {batch}", batch=batch) for batch in (2, 8)),
]
LARGE = [
    case(f"{size} pixels, {what}", size=size, decoder_guidance=guidance, compression=64.0)
    for size in (2048, 4096)
    for what, guidance in (("compression 64", 0.0), ("authors' guidance, 64", 1.1))
]
LARGE.append(case("4096 pixels", size=4096))
WITH_IMAGE = [case("edges, ControlNet", image="control"), case("image-to-image, 0.5", image="start")]
FASTER = [
    case("fast", speed="fast"),
    case("fast, batch 4", speed="fast", batch=4),
    case("fast, authors' guidance", speed="fast", decoder_guidance=1.1),
]
# Compiling takes minutes, so compiled contenders are measured in one case only.
BY_CONTENDER = {
    "diffusers, model offload": CASES[:1],
    "diffusers, torch.compile": CASES[:1],
    "diffusers, reduce-overhead": CASES[:1],
    "ours": CASES + FASTER + WITH_IMAGE + GROWTH + LARGE,
    "ours, int8": CASES,
    "ours, fp8": CASES + FASTER,
    "ours, offload": [CASES[0], GROWTH[4], *LARGE],
    "ours, stream": [CASES[0], GROWTH[4], *LARGE],
}
ALL = CASES + FASTER + WITH_IMAGE + GROWTH + LARGE


def floor(one: dict[str, Any], rate: float) -> float | None:
    """Seconds per image if the counted work ran at `rate`; None for other sizes than 1024x1024 and for image inputs.

    Args:
        one: a case.
        rate: 10**12 operations per second.
    """
    if one["size"] != 1024 or one["image"]:
        return None
    prior, decoder = WORK[one["lite"]]
    halves = 2 if one["decoder_guidance"] > 1 else 1
    prior_steps, decoder_steps = steps_of(one["speed"])
    return (2 * prior_steps * prior + halves * decoder_steps * decoder + WORK_STAGE_A) / rate


def matmul_rate(side: int = 8192, runs: int = 20) -> float:
    """10**12 operations per second in a product of random bfloat16 matrices: the median of `runs`."""
    first, second = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(runs + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        first @ second
        end.record()
        torch.cuda.synchronize()
        rates.append(2 * side**3 / start.elapsed_time(end) / 1e9)
    return statistics.median(rates[3:])


def run(names: list[str], chosen: list[str], runs: int, folder: Path, file: Path) -> dict[str, Any]:
    """Time the contenders, and return the results. They are also written to the file after each contender."""
    start = time.perf_counter()
    write_stand_ins(folder, "cuda")
    torch.cuda.empty_cache()
    sys.stderr.write(f"Stand-ins written in {time.perf_counter() - start:.0f} s.\n")
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "runs": runs,
        "matmul_rate": matmul_rate(),
    }
    results = []
    for name in names:
        cases = [one for one in BY_CONTENDER.get(name, CASES) if one["name"] in chosen]
        if not cases:
            continue
        arguments = [sys.executable, "-m", "scripts.contenders", name, str(folder), json.dumps(cases), str(runs)]
        arguments.append(str(time.time()))
        process = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        results += lines or [{"contender": name, "case": cases[0]["name"], "error": f"exit {process.returncode}"}]
        for line in lines or results[-1:]:
            sys.stderr.write(f"{json.dumps(line)}\n")
        file.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return {"machine": machine, "results": results}


def table(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    machine, cases = found["machine"], {one["name"]: one for one in ALL}
    rows = [
        "| case | contender | s an image | images a second | peak GiB (reserved) | ratio to the floor | first, s | ready, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(found["results"], key=lambda one: list(cases).index(one["case"])):
        start = f"| {result['case']} | {result['contender']} | "
        if "error" in result:
            rows.append(f"{start}{result['error']} | | | | | |")
            continue
        least = floor(cases[result["case"]], machine["matmul_rate"])
        ratio = f"{result['per_image'] / least:.2f}" if least else ""
        rows.append(
            f"{start}{result['per_image']:.3f} | {1 / result['per_image']:.2f} | "
            f"{result['allocated']:.1f} ({result['reserved']:.1f}) | {ratio} | "
            f"{result['first']:.1f} | {result['ready']:.1f} |"
        )
    head = (
        f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}, bfloat16, medians of {machine['runs']} runs; "
        f"matrix products run at {machine['matmul_rate']:.0f} TFLOP/s."
    )
    return "\n".join([head, "", *rows])


def plot(found: dict[str, Any], file: Path) -> None:
    """Draw the first case: seconds per image and peak memory, one bar per contender, with the floor as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [one for one in found["results"] if one["case"] == CASES[0]["name"] and "error" not in one]
    shown.sort(key=lambda one: -one["per_image"])
    names = [one["contender"] for one in shown]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.5 * len(shown) + 1.2), sharey=True)
    bars = left.barh(names, [one["per_image"] for one in shown], color="#4878a8")
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.axvline(floor(CASES[0], found["machine"]["matmul_rate"]), color="#a04040", linewidth=1)
    left.set_xlabel("seconds an image (line: the floor)")
    left.margins(x=0.15)
    bars = right.barh(names, [one["allocated"] for one in shown], color="#78a848")
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set_xlabel("peak GiB")
    right.margins(x=0.15)
    figure.suptitle(f"1024x1024, 20 + 10 steps, {found['machine']['gpu']}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time contenders on this GPU with stand-ins of the published sizes.")
    parser.add_argument(
        "--contenders",
        nargs="*",
        choices=CONTENDERS,
        default=[name for name in CONTENDERS if "compile" not in name and "overhead" not in name],
        help="default: all but the compiled ones, which take minutes to compile",
    )
    names = [one["name"] for one in ALL]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, help="default: all")
    parser.add_argument(
        "--runs", type=int, default=5, help="timed runs per case, after two warm-up runs (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where the stand-ins are kept while it runs, 18 GB (default: a temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmark", help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="make the table and the plot from these results; time nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.results:
        found = json.loads(options.results.read_text())
    else:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device to measure")
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = options.output / "results.json"
            found = run(options.contenders, options.cases, options.runs, Path(folder), file)
    (options.output / "table.md").write_text(table(found) + "\n")
    print(table(found))
    plot(found, options.output / "plot.png")


if __name__ == "__main__":
    main()
