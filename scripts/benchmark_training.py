"""What training Stage C at its full size costs on this machine's GPUs, and whether a resumed training equals an uninterrupted:

    python -m torch.distributed.run --standalone --nproc_per_node 4 -m scripts.benchmark_training speed
    python -m torch.distributed.run --standalone --nproc_per_node 4 -m scripts.benchmark_training resume --folder /scratch

The configuration is training/published.toml; weights and encoded pictures are random, on which time and memory do not depend.
`speed` measures the rate of matrix products of each GPU, and times optimizer steps. `resume` writes a checkpoint, which takes
58 GB in FOLDER while it runs, and compares losses and weights after further steps; it computes deterministically.

Each measurement is printed at once as a line of JSON. All together are in the file `--output`, which is complete after each of
them, so that a run that is stopped leaves what it has measured.
"""

import argparse
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cascade.networks.unet import StableCascadeUNet
from cascade.sizes import semantic_size
from scripts.benchmarking import matmul_rate
from scripts.environment import ROOT
from scripts.stand_ins import DEVIATION
from training.command import AtLeastOne, InRange
from training.encoded.recipe import Recipe, read_recipe
from training.encoded.run import new_prior
from training.encoded.shards import EncodedPictures, shard_file, write_empty, write_shard
from training.files import whole_file
from training.processes import start_processes
from training.tasks.encoded_stage_c import EncodedStageCTask
from training.trainer import Trainer
from training.values import Range
from training.weights.fsdp import local

WARM_UP = 3
PICTURES = 64
# A training step is worth three forwards: the backward pass multiplies twice as many matrices. Recomputing adds to the work, but
# not to what it is worth.
FORWARDS = 3
GIB = 2**30
# Bytes of a parameter in a checkpoint: the weight, its average, and AdamW's two moments, in float32.
BYTES = 16


class Report:
    """What was measured so far: printed line by line, and kept in a JSON file, by the first process.

    Args:
        file: the JSON file.
        state: of the processes.
    """

    def __init__(self, file: Path, state: PartialState) -> None:
        self.file, self.state = file, state
        self.found: dict[str, Any] = {}

    def line(self, part: str, **found: Any) -> None:
        """Prints a measurement."""
        if self.state.is_main_process:
            print(json.dumps({"part": part, **found}), flush=True)

    def keep(self, **found: Any) -> None:
        """Adds measurements to the file, or replaces them."""
        self.found |= found
        if self.state.is_main_process:
            with whole_file(self.file) as part:
                part.write_text(json.dumps(self.found, indent=1) + "\n")


def gathered(value: Any) -> list[Any]:
    """A value of each process."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def measure_gpus(report: Report, device: torch.device) -> float | None:
    """The rate of matrix products of each GPU, all at the same time, in 10**12 operations a second. Returns the mean; None on a
    CPU."""
    rates = gathered(matmul_rate() if device.type == "cuda" else None)
    gpus = [
        {"gpu": rank, "name": name, "matmul_rate": rate}
        for rank, (name, rate) in enumerate(zip(gathered(name_of(device)), rates, strict=True))
    ]
    for one in gpus:
        report.line("gpu", **one)
    report.keep(torch=torch.__version__, gpus=gpus)
    return None if None in rates else statistics.mean(rates)


def forward_work(recipe: Recipe, side: int) -> float:
    """10**12 operations in matrix products and convolutions of a forward of one sample, by torch's counter.

    Args:
        side: of the picture in pixels.
    """
    with torch.device("meta"):
        prior = StableCascadeUNet(**recipe.prior).eval()
        latents = torch.empty(1, prior.config.in_channels, *semantic_size(side, side))
        widths = {name: recipe.prior[f"clip_{name}_in_channels"] for name in ("text", "text_pooled", "image")}
        conditions = {
            "clip_text": torch.empty(1, 77, widths["text"]),
            "clip_text_pooled": torch.empty(1, 1, widths["text_pooled"]),
            "clip_img": torch.empty(1, 1, widths["image"]),
        }
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            prior(latents, torch.ones(1), **conditions)
    return counter.get_total_flops() / 1e12


def write_pictures(folder: Path, recipe: Recipe, side: int) -> None:
    """Random encoded pictures of one size."""
    text, pooled, image = (recipe.prior[f"clip_{name}_in_channels"] for name in ("text", "text_pooled", "image"))
    shapes = {
        "latents": (16, *semantic_size(side, side)),
        "image": (1, image),
        "text": (77, text),
        "pooled": (1, pooled),
    }
    made = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(PICTURES)]
    write_shard(shard_file(folder, "random"), {(side, side): made})
    write_empty(folder, torch.randn(77, text), torch.randn(1, pooled))


@torch.no_grad()
def make_trainer(recipe: Recipe, pictures: Path, folder: Path, device: torch.device) -> Trainer:
    """The real training, with random weights everywhere: a new network's last layers are zero, and products with zeros are
    faster."""
    torch.manual_seed(recipe.options.seed)
    prior = new_prior(recipe, device).train()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=DEVIATION)
    task = EncodedStageCTask(prior, EncodedPictures(pictures, device), **recipe.task)
    return Trainer(task, recipe.options, folder / "training", folder, time.time())


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed_step(trainer: Trainer) -> tuple[float, float]:
    """One optimizer step: its seconds, of the slowest process, and its loss, of this one."""
    synchronise(trainer.device)
    trainer.accelerator.wait_for_everyone()
    start = time.perf_counter()
    loss = trainer.step()["loss"]
    synchronise(trainer.device)
    seconds = max(gathered(time.perf_counter() - start))
    return seconds, loss.item()


def memory(device: torch.device) -> list[dict[str, float]]:
    """The most memory that each GPU has used, and that it has reserved, in GiB; nothing on a CPU."""
    if device.type != "cuda":
        return []
    peaks = (torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB)
    return [{"gpu": rank, "peak_gib": one, "reserved_gib": two} for rank, (one, two) in enumerate(gathered(peaks))]


def measure_speed(report: Report, trainer: Trainer, recipe: Recipe, steps: int, side: int, rate: float | None) -> None:
    """Times steps; keeps, after each, samples a second, the rate of the work, its share of the rate of matrix products, and
    memory.

    Args:
        side: of the pictures in pixels.
        rate: of matrix products, of one GPU, in 10**12 operations a second; None: not measured.
    """
    processes = trainer.accelerator.num_processes
    samples = recipe.options.samples(processes)
    work = FORWARDS * forward_work(recipe, side)
    report.keep(samples_a_step=samples, tflops_a_sample=work, warm_up=[], seconds=[])
    for number in range(1, WARM_UP + steps + 1):
        seconds, loss = timed_step(trainer)
        kind = "warm_up" if number <= WARM_UP else "seconds"
        report.found[kind].append(seconds)
        if number <= WARM_UP:
            report.keep(memory_in_warm_up=memory(trainer.device))
            if number == WARM_UP and trainer.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        else:
            a_second = samples / statistics.median(report.found["seconds"])
            each = work * a_second / processes
            report.keep(
                samples_a_second=a_second,
                tflops_a_second_each=each,
                share=each / rate if rate else None,
                memory=memory(trainer.device),
            )
        # After the file, so that it has all that was printed.
        report.line("step", step=number, kind=kind, seconds=seconds, samples_a_second=samples / seconds, loss=loss)
    report.line("speed", **{name: report.found[name] for name in ("samples_a_second", "share", "memory")})


def profile(report: Report, trainer: Trainer, rows: int) -> None:
    """Prints the GPU's time by kernel in one step, of the first process."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        timed_step(trainer)
    if report.state.is_main_process:
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=90)
        print(table, flush=True)


def digest(trainer: Trainer) -> str:
    """A hash of all weights, their averages and the optimizer's state, of all processes."""
    own = hashlib.sha256()
    moments = [value for one in trainer.weights.trained for value in trainer.weights.optimizer.state[one].values()]
    for value in (*trainer.weights.own(), *trainer.weights.ema.shadow_params, *local(moments)):
        own.update(_bytes(value))
    return hashlib.sha256("".join(gathered(own.hexdigest())).encode()).hexdigest()


def _bytes(value: Tensor) -> bytes:
    """A short stand-in for a tensor's bytes, which depends on each of them: sums of its words, with factors by their places.

    Copying 15 GB to the CPU and hashing them there would take a minute.
    """
    words = value.detach().contiguous().view(-1).view(torch.int32)
    sums = [torch.zeros(2, dtype=torch.int64, device=value.device)]
    for first in range(0, len(words), 2**26):
        some = words[first : first + 2**26].long()
        places = torch.arange(first + 1, first + 1 + len(some), device=value.device)
        sums.append(torch.stack([some.sum(), (some * (places * 2654435761 % 2**31)).sum()]))
    return torch.stack(sums).cpu().numpy().tobytes()


def further(report: Report, trainer: Trainer, steps: int) -> dict[str, Any]:
    """Trains further steps; the loss of each, of the first process, and the digest at the end."""
    losses = []
    for _ in range(steps):
        seconds, loss = timed_step(trainer)
        losses.append(loss)
        report.line("step", step=trainer.progress.step, seconds=seconds, loss=loss)
    return {"losses": losses, "digest": digest(trainer)}


def measure_resuming(
    report: Report, recipe: Recipe, pictures: Path, folder: Path, device: torch.device, steps: int
) -> bool:
    """Saves a training, trains further steps, and does the same with a training that is loaded; whether both are equal."""
    trainer = make_trainer(recipe, pictures, folder, device)
    further(report, trainer, 2)
    start = time.perf_counter()
    trainer.save()
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in trainer.weights.checkpoint.path.iterdir()) / 1e9
    report.keep(saved={"gigabytes": size, "seconds": seconds, "step": trainer.progress.step})
    report.line("saved", **report.found["saved"])
    first = further(report, trainer, steps)
    report.keep(uninterrupted=first)
    report.line("uninterrupted", **first)
    del trainer
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        report.line("freed", left_gib=torch.cuda.memory_allocated(device) / GIB)
    start = time.perf_counter()
    trainer = make_trainer(recipe, pictures, folder, device)
    report.keep(loaded={"seconds": time.perf_counter() - start, "step": trainer.progress.step})
    report.line("loaded", **report.found["loaded"])
    second = further(report, trainer, steps)
    report.keep(resumed=second, equal=first == second)
    report.line("resumed", **second, equal=first == second)
    return first == second


def be_deterministic() -> None:
    """Makes equal computations give equal bits, as far as torch can, which takes time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's next line
    # With `warn_only`, the backward pass of attention is not deterministic: on four H100, a resumed training then differed in the
    # sixth digit of the second loss.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.deterministic = True  # kernels are not chosen by their times


@contextlib.contextmanager
def scratch(parent: Path, state: PartialState, needed: float) -> Iterator[Path]:
    """A folder for all processes, which is deleted after the block, and before it, if a run that was killed has left it.

    Args:
        parent: gets the folder.
        state: of the processes.
        needed: gigabytes that it will have.

    Raises:
        SystemExit: the disk has less space.
    """
    folder = parent / "benchmark-training"
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    state.wait_for_everyone()
    try:
        free = shutil.disk_usage(folder).free / 1e9
        if free < needed:
            raise SystemExit(
                f"{parent} has {free:.0f} GB free, and a checkpoint takes {needed:.0f} GB; name another --folder."
            )
        yield folder
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def end(number: int, frame: FrameType | None) -> None:
    """Ends the process by an exception, so that what it has written is deleted."""
    raise SystemExit(128 + number)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.benchmark_training", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("speed", "resume"))
    parser.add_argument(
        "--config", type=Path, default=ROOT / "training" / "published.toml", help="default: %(default)s"
    )
    parser.add_argument("--steps", action=AtLeastOne, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of one step")
    parser.add_argument(
        "--further", action=AtLeastOne, default=3, help="steps after the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--side", type=int, default=1024, help="of the pictures in pixels (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, help="pictures in a micro-batch of a GPU, instead of the configuration's"
    )
    parser.add_argument("--accumulate", type=int, help="micro-batches in a step, instead of the configuration's")
    parser.add_argument(
        "--recompute",
        action=InRange,
        type=float,
        allowed=Range(0, 1),
        help="share of the layers, instead of the configuration's",
    )
    parser.add_argument("--no-compile", action="store_true", help="run the blocks as they are")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="gets the random pictures and the checkpoint while it runs (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="default: build/benchmark/training-PART.json")
    options = parser.parse_args(arguments)
    options.output = options.output or ROOT / "build" / "benchmark" / f"training-{options.part}.json"
    return options


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The configuration with the command line's changes."""
    recipe = read_recipe(options.config)
    given = {"batch_size": options.batch_size, "accumulate": options.accumulate}
    given = {name: value for name, value in given.items() if value is not None}
    if options.no_compile:
        given["compile"] = False
    task = recipe.task if options.recompute is None else {**recipe.task, "recompute": options.recompute}
    return dataclasses.replace(recipe, options=dataclasses.replace(recipe.options, **given), task=task)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if a resumed training differs."""
    options = parse(arguments)
    if options.part == "resume":
        be_deterministic()
    recipe, state = recipe_of(options), start_processes()
    report = Report(options.output, state)
    report.keep(
        part=options.part,
        processes=state.num_processes,
        side=options.side,
        options=dataclasses.asdict(recipe.options),
        task=dict(recipe.task),
    )
    rate = measure_gpus(report, state.device)
    with torch.device("meta"):
        parameters = sum(one.numel() for one in StableCascadeUNet(**recipe.prior).parameters())
    needed = 1 + (BYTES * parameters / 1e9 if options.part == "resume" else 0)
    equal = True
    with scratch(options.folder, state, needed) as folder:
        pictures = folder / "pictures"
        if state.is_main_process:
            write_pictures(pictures, recipe, options.side)
        state.wait_for_everyone()
        if options.part == "resume":
            equal = measure_resuming(report, recipe, pictures, folder, state.device, options.further)
        else:
            start = time.perf_counter()
            trainer = make_trainer(recipe, pictures, folder, state.device)
            report.line("made", seconds=time.perf_counter() - start, parameters=parameters)
            measure_speed(report, trainer, recipe, options.steps, options.side, rate)
            if options.profile:
                profile(report, trainer, 40)
        state.wait_for_everyone()
    state.destroy_process_group()
    return 0 if equal else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)  # torchrun ends its processes so
    sys.exit(main())
