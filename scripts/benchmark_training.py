"""What training Stage C at its full size costs on this machine's GPUs, and whether a resumed training equals an uninterrupted:

    python -m torch.distributed.run --standalone --nproc_per_node 4 -m scripts.benchmark_training speed
    python -m torch.distributed.run --standalone --nproc_per_node 4 -m scripts.benchmark_training resume --folder /scratch

The configuration is training/published.toml; weights and encoded pictures are random, on which time and memory do not depend.
`speed` times optimizer steps. `resume` writes a checkpoint, which takes 58 GB in FOLDER while it runs, and compares losses and
weights after further steps; it computes deterministically. Prints JSON, a line a measurement.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
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
from training.encoded.recipe import Recipe, read_recipe
from training.encoded.run import new_prior
from training.encoded.shards import EncodedPictures, shard_file, write_empty, write_shard
from training.run import start_processes
from training.tasks.encoded_stage_c import EncodedStageCTask
from training.trainer import Trainer
from training.weights.fsdp import local

WARM_UP = 3
PICTURES = 64
# A training step is worth three forwards: the backward pass multiplies twice as many matrices. Recomputing adds to the work, but
# not to what it is worth.
FORWARDS = 3
GIB = 2**30


def report(state: PartialState, **found: Any) -> None:
    """Prints a measurement, by the first process."""
    if state.is_main_process:
        print(json.dumps(found), flush=True)


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


def timed_steps(trainer: Trainer, count: int) -> list[float]:
    """Seconds of each optimizer step, of the slowest process."""
    seconds = []
    for _ in range(count):
        synchronise(trainer.device)
        dist.barrier()
        start = time.perf_counter()
        trainer.step()
        synchronise(trainer.device)
        longest = torch.tensor(time.perf_counter() - start, device=trainer.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        seconds.append(longest.item())
    return seconds


def measure_speed(state: PartialState, trainer: Trainer, recipe: Recipe, steps: int, work: float) -> None:
    """Times steps; reports samples a second, the rate of the work, and its share of the rate of matrix products."""
    options, cuda = recipe.options, trainer.device.type == "cuda"
    first = timed_steps(trainer, 1)
    timed_steps(trainer, WARM_UP - 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = timed_steps(trainer, steps)
    samples = options.samples(state.num_processes)
    rate = samples / statistics.median(seconds)
    each = FORWARDS * work * rate / state.num_processes
    found = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": state.num_processes,
        "batch_size": options.batch_size,
        "accumulate": options.accumulate,
        "recompute": recipe.task.get("recompute", 1.0),
        "compile": options.compile,
        "first_step": first[0],
        "seconds": [round(one, 4) for one in seconds],
        "samples_a_second": rate,
        "tflops_a_sample": FORWARDS * work,
        "tflops_a_second_each": each,
    }
    if cuda:
        found["matmul_rate"] = best = matmul_rate()
        found["share"] = each / best
        peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
        peak = torch.tensor(peaks, dtype=torch.float64, device=trainer.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found["peak_gib"], found["reserved_gib"] = (peak / GIB).tolist()
    report(state, part="speed", **found)


def profile(state: PartialState, trainer: Trainer, rows: int) -> None:
    """Prints the GPU's time by kernel in one step, of the first process."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        timed_steps(trainer, 1)
    if state.is_main_process:
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=90))


def digest(trainer: Trainer) -> str:
    """A hash of all weights, their averages and the optimizer's state, of all processes."""
    own = hashlib.sha256()
    moments = [value for one in trainer.weights.trained for value in trainer.weights.optimizer.state[one].values()]
    for value in (*local(trainer.weights.trained), *trainer.weights.ema.shadow_params, *local(moments)):
        own.update(_bytes(value))
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own.hexdigest())
    return hashlib.sha256("".join(found).encode()).hexdigest()


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


def further(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Trains further steps; the loss of each, of the first process, and the digest at the end."""
    losses = [trainer.step()["loss"].item() for _ in range(steps)]
    return {"losses": losses, "digest": digest(trainer)}


def saved_and_further(state: PartialState, trainer: Trainer, steps: int) -> dict[str, Any]:
    """Saves, and trains further; see `further`."""
    start = time.perf_counter()
    trainer.save()
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in trainer.weights.checkpoint.path.iterdir())
    report(state, part="saved", gigabytes=size / 1e9, seconds=seconds, step=trainer.progress.step)
    found = further(trainer, steps)
    report(state, part="uninterrupted", **found)
    return found


def loaded_and_further(state: PartialState, recipe: Recipe, pictures: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Makes the training again, from the checkpoint, which is deleted then, and trains further; see `further`."""
    start = time.perf_counter()
    trainer = make_trainer(recipe, pictures, folder, state.device)
    report(state, part="loaded", seconds=time.perf_counter() - start, step=trainer.progress.step)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(trainer.weights.checkpoint.path)
    found = further(trainer, steps)
    report(state, part="resumed", **found)
    return found


def be_deterministic() -> None:
    """Makes equal computations give equal bits, as far as torch can, which takes time."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's next line
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch._inductor.config.deterministic = True  # kernels are not chosen by their times


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts.benchmark_training", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=("speed", "profile", "resume"))
    parser.add_argument(
        "--config", type=Path, default=ROOT / "training" / "published.toml", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--further", type=int, default=3, help="steps after the checkpoint (default: %(default)s)")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures in pixels (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, help="pictures in a micro-batch of a GPU, instead of the configuration's"
    )
    parser.add_argument("--accumulate", type=int, help="micro-batches in a step, instead of the configuration's")
    parser.add_argument("--recompute", type=float, help="share of the layers, instead of the configuration's")
    parser.add_argument("--no-compile", action="store_true", help="run the blocks as they are")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is kept (default: a temporary folder)")
    return parser.parse_args(arguments)


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
    if "resume" in options.parts:
        be_deterministic()
    recipe, state = recipe_of(options), start_processes()
    equal = True
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        shared = [temporary]  # the first process's
        dist.broadcast_object_list(shared, 0)
        folder = Path(shared[0])
        pictures = folder / "pictures"
        if state.is_main_process:
            write_pictures(pictures, recipe, options.side)
        state.wait_for_everyone()
        trainer = make_trainer(recipe, pictures, folder, state.device)
        if "speed" in options.parts:
            measure_speed(state, trainer, recipe, options.steps, forward_work(recipe, options.side))
        if "profile" in options.parts:
            profile(state, trainer, 40)
        if "resume" in options.parts:
            timed_steps(trainer, 2)
            first = saved_and_further(state, trainer, options.further)
            del trainer
            gc.collect()
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
            second = loaded_and_further(state, recipe, pictures, folder, options.further)
            equal = first == second
            report(state, part="resume", equal=equal)
        state.wait_for_everyone()
    state.destroy_process_group()
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
