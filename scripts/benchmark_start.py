"""Times starts of Cog's server, until it is READY, and predictions, from request to answer: see `scripts/benchmark-start`.

Of each start, Triton's cache is a new empty folder, and the files were read before, so they are in the page cache. "Floor" is
Cog's server with a Predictor that imports torch and touches the GPU. The time of the engine is the sum of the metrics
`seconds` without safety and encoding. Processor seconds are those of the server and of all processes that it has started, until
it is READY: on a busy machine they say more than the time.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cascade.kernels.compiled import SUMS, architecture_folder
from scripts.environment import ROOT
from scripts.server import free_port, read_config, write_schema

EMPTY = """
import torch
from cog import BaseRunner


class Predictor(BaseRunner):
    def setup(self) -> None:
        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()

    def run(self, text: str) -> str:
        return text
"""
MODELS = ("floor", "mini", "full")
STANDS_IN = ("prior", "decoder", "vqgan")
FORMATS = ("webp", "jpg", "png")
NOT_ENGINE = ("encoding", "safety", "previews")
LONGEST = 300  # seconds
# The authors' guidance of Stage B.
GUIDED = {"guidance_scale_decoder": 1.1}


class Start(NamedTuple):
    """Seconds until a server was READY, and what it took of processors until then, in seconds."""

    ready: float
    processor: float


def processor_seconds(first: int) -> float:
    """What a process, those that it started and theirs have taken of processors, in seconds; 0 except on Linux."""
    parents, taken = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()  # the name before may hold spaces
        except OSError:  # it has ended
            continue
        parents[int(file.parent.name)] = int(fields[1])
        # Of its own, and of its children that have ended.
        taken[int(file.parent.name)] = sum(map(int, fields[11:15]))
    total, found = 0, [first]
    while found:
        one = found.pop()
        total += taken.get(one, 0)
        found += [child for child, parent in parents.items() if parent == one]
    return total / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(predictor: str, folder: Path, working: Path, **variables: str) -> Iterator[tuple[str, Start, Path]]:
    """Cog's server while the block runs. Yields its URL, how it started, and its log."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        port, log = free_port(), Path(scratch, "log")
        _, _, own = read_config()
        environment = {
            "LOG_FORMAT": "console",
            **own,
            **os.environ,
            **variables,
            "COG_PREDICT_TYPE_STUB": predictor,
            "PORT": str(port),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": scratch,
            "TRITON_CACHE_DIR": str(Path(scratch, "triton")),
        }
        start = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=working,
                env=environment,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            while (state := _state(url)) != "READY":
                if process.poll() is not None or state == "SETUP_FAILED" or time.perf_counter() - start > LONGEST:
                    raise RuntimeError(f"The server did not start. Its log:\n{log.read_text()}")
                time.sleep(0.01)
            yield url, Start(time.perf_counter() - start, processor_seconds(process.pid)), log
        finally:
            process.terminate()
            process.wait()


def _state(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/health-check", timeout=LONGEST) as answer:
            return json.load(answer)["status"]
    except OSError:
        return ""


def predict(url: str, **inputs: Any) -> tuple[float, float, int]:
    """Seconds from a request to the end of its answer, seconds of the engine, and characters of the answer's pictures."""
    body = json.dumps({"input": inputs}).encode()
    request = urllib.request.Request(f"{url}/predictions", body, {"Content-Type": "application/json"})
    while True:
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=LONGEST) as answer:
                content = answer.read()
            break
        except urllib.error.HTTPError as error:
            if error.code != 409:  # the earlier prediction's answer comes a moment before the server is ready
                raise
    seconds = time.perf_counter() - start
    answered = json.loads(content)
    if answered["status"] != "succeeded":
        raise RuntimeError(f"The prediction failed: {answered['error']}")
    metrics = answered["metrics"]
    stages = {name.removeprefix("seconds."): value for name, value in metrics.items() if name.startswith("seconds.")}
    stages |= metrics.get("seconds") or {}
    engine = sum(value for name, value in stages.items() if name not in NOT_ENGINE)
    return seconds, engine, sum(len(picture) for picture in answered["output"])


def times(url: str, side: int, runs: int, **inputs: Any) -> dict[str, Any]:
    """The first prediction of a process, and later ones."""
    given = {"prompt": "a red circle on a blue background", "width": side, "height": side, "seed": 1, **inputs}
    first = predict(url, **given)[0]
    later = [predict(url, **given)[0] for _ in range(runs)]
    return {"first_s": round(first, 3), "later_s": round(statistics.median(later), 3)}


def answers(url: str, model: str, side: int, runs: int, **inputs: Any) -> list[dict[str, Any]]:
    """From request to answer, for one and four pictures in each format."""
    found = []
    for count in (1, 4):
        for ending in FORMATS:
            given = {"prompt": "a red circle on a blue background", "width": side, "height": side, "seed": 1, **inputs}
            given |= {"num_images": count, "output_format": ending}
            predict(url, **given)
            measured = [predict(url, **given) for _ in range(runs)]
            seconds, engine = (statistics.median(one[place] for one in measured) for place in (0, 1))
            over = statistics.median(one[0] - one[1] for one in measured)
            found.append(
                {
                    "model": model,
                    "pictures": count,
                    "format": ending,
                    "side": side,
                    "answer_s": round(seconds, 3),
                    "engine_s": round(engine, 3),
                    "over_s": round(over, 3),
                    "kilobytes": round(measured[0][2] * 3 / 4 / 1000 / count),
                }
            )
            sys.stderr.write(f"{json.dumps(found[-1])}\n")
    return found


def prepare(folder: Path) -> None:
    """Write stand-ins of the full networks, in a process of its own, which gives its GPU memory back."""
    code = (
        "import sys; from pathlib import Path; from scripts.stand_ins import write_stand_ins; "
        "write_stand_ins(Path(sys.argv[1]), 'cuda', sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", code, folder, *STANDS_IN], cwd=ROOT, check=True)


def compile_if_missing() -> None:
    """Compile the kernels for this machine's GPU, unless that was done."""
    major, minor = torch.cuda.get_device_capability()
    if not (architecture_folder(10 * major + minor) / SUMS).is_file():
        arguments = ["--architectures", str(10 * major + minor), "--python", sys.executable]
        subprocess.run([sys.executable, "-m", "scripts.compile_kernels", *arguments], cwd=ROOT, check=True)


def measure(models: list[str], runs: int, folder: Path, side: int | None) -> dict[str, list[dict[str, Any]]]:
    """Time all starts and predictions."""
    starts: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    gpu = torch.cuda.is_available()
    empty = folder / "empty"
    empty.mkdir()
    (empty / "predict.py").write_text(EMPTY)
    runner, trainer, _ = read_config()
    working = write_schema(runner, trainer)
    weights = {"mini": ROOT / "weights" / "mini", "full": folder / "full"}
    if gpu:
        compile_if_missing()
    for model in models:
        if model == "full":
            prepare(weights["full"])
        variables = {"CASCADE_WEIGHTS": str(weights[model])} if model in weights else {}
        where = (f"{empty}/predict.py:Predictor", empty) if model == "floor" else (f"{ROOT}/{runner}", working)
        with server(where[0], folder, where[1], **variables):
            pass  # has read the files; is not counted
        for kernels in ("compiled", "not compiled") if gpu and model != "floor" else ("",):
            compiles = {"TRITON_ALWAYS_COMPILE": "1"} if kernels == "not compiled" else {}
            count = 1 if compiles else runs
            for number in range(count):
                with server(where[0], folder, where[1], **variables, **compiles) as (url, started, log):
                    one = {"model": model, "kernels": kernels, "ready_s": round(started.ready, 2)}
                    one["processor_s"] = round(started.processor, 2)
                    if said := re.search(r"Prepared the kernels.*", log.read_text()):
                        one["log"] = said.group()
                    if model != "floor":
                        one |= times(url, side or (256 if model == "mini" else 1024), runs)
                        if number == count - 1 and not compiles:
                            ends += answers(url, model, side or 1024, runs, **GUIDED)
                starts.append(one)
                sys.stderr.write(f"{json.dumps(one)}\n")
    return {"starts": starts, "answers": ends}


def tables(found: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found["starts"]:
        groups.setdefault((one["model"], one["kernels"]), []).append(one)
    ready, taken = (
        {key: statistics.median(one[name] for one in ones) for key, ones in groups.items()}
        for name in ("ready_s", "processor_s")
    )
    floor = ready.get(("floor", ""))
    lines = [
        "| start | kernels | starts | READY, s | over the floor, s | processors, s | first picture, s | later ones, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (model, kernels), ones in groups.items():
        seconds = ready[model, kernels]
        over = "" if floor is None or model == "floor" else f"{seconds - floor:.2f}"
        pictures = [
            f"{statistics.median(one[name] for one in ones):.3f}" if name in ones[0] else ""
            for name in ("first_s", "later_s")
        ]
        row = (model, kernels, len(ones), f"{seconds:.2f}", over, f"{taken[model, kernels]:.2f}", *pictures)
        lines.append(f"| {' | '.join(map(str, row))} |")
    lines += [
        "",
        "| model | pictures | format | side | request to answer, s | engine, s | over, s | kB a picture |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    names = ("model", "pictures", "format", "side", "answer_s", "engine_s", "over_s", "kilobytes")
    lines += [f"| {' | '.join(str(one[name]) for name in names)} |" for one in found["answers"]]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables, and write all results as JSON."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark-start", description="Time starts of the service, and answers, on this machine."
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS if gpu else MODELS[:2])
    parser.add_argument(
        "--runs", type=int, default=3, help="starts of each kind, and predictions (default: %(default)s)"
    )
    parser.add_argument("--side", type=int, help="pixels; default: 1024, and the model's own size for first pictures")
    parser.add_argument("--folder", type=Path, help="where the networks are kept while it runs, 13 GB")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "benchmark" / "start.json", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if "full" in options.models and not gpu:
        parser.error("the full networks need a CUDA device")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found: dict[str, Any] = measure(options.models, options.runs, Path(folder), options.side)
    found["machine"] = {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
