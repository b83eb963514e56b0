"""What the processes of `test_sharding` run: python -m torch.distributed.run ... sharded_training.py FOLDER RUN..."""

import copy
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cascade.networks.unet import StableCascadeUNet
from training.dataset import Dataset
from training.encoded.shards import EncodedPictures, shard_file, write_empty, write_shard
from training.gradient_check import compare_gradients
from training.latents import encode_pictures
from training.options import Options
from training.processes import start_processes
from training.run import train as train_stage
from training.tasks.encoded_stage_c import EncodedStageCTask
from training.tasks.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from training.trainer import Trainer
from training.weights.fsdp import shard, whole

STEPS = 4
OPTIONS = Options(
    steps=STEPS,
    batch_size=2,
    learning_rate=1e-2,
    warmup=1,
    clip=0.5,
    accumulate=2,
    ema=0.9,
    compile=False,
    sharded=True,
)
REPLICATED = replace(OPTIONS, sharded=False, gpus=2, batch_size=4)
WIDTH = 16
SIZES = {
    "conditioning_dim": WIDTH,
    "block_out_channels": (WIDTH, WIDTH),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 2),
    "up_num_layers_per_block": (2, 1),
    "clip_text_in_channels": WIDTH,
    "clip_text_pooled_in_channels": WIDTH,
    "clip_image_in_channels": WIDTH,
    "switch_level": (False,),
}


def write_pictures(folder: Path) -> None:
    """Random encoded pictures of two sizes."""
    generator = torch.Generator().manual_seed(0)

    def picture(height: int, width: int) -> dict[str, Tensor]:
        shapes = {"latents": (16, height, width), "image": (1, WIDTH), "text": (77, WIDTH), "pooled": (1, WIDTH)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    for number in range(2):
        made = {(128, 128): [picture(3, 3) for _ in range(5)], (192, 128): [picture(5, 3) for _ in range(4)]}
        write_shard(shard_file(folder, str(number)), made)
    write_empty(folder, *(torch.randn(rows, WIDTH, generator=generator) for rows in (77, 1)))


class DividedTask(EncodedStageCTask):
    """Each process has its share of the one process's micro-batch."""

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        count, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        whole_batch = super().batch(index, size * count, torch.Generator().manual_seed(index))
        return {name: value[rank * size : (rank + 1) * size] for name, value in whole_batch.items()}


class Reductions(TorchDispatchMode):
    """Counts collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.seen[function.__name__.split(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


def make_task(pictures: Path, *, dropout: float, recompute: float = 1.0, weight: str = "p2") -> DividedTask:
    torch.manual_seed(0)
    task = DividedTask(
        StableCascadeUNet(**SIZES, dropout=dropout).train(),
        EncodedPictures(pictures, torch.device("cpu")),
        weight={"kind": weight},
        drop_text=0.1,
        keep_image=0.5,
        recompute=recompute,
    )
    with torch.no_grad():  # the initial weights of the last layers are zero
        for parameter in task.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return task


def make_trainer(pictures: Path, folder: Path, options: Options, **others: Any) -> Trainer:
    return Trainer(make_task(pictures, **others), options, folder, folder / "model", 0.0)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All weights, whole, and their averages; on the first process."""
    found = {}
    for name in ("weights", "averages"):
        if name == "averages":
            trainer.weights.ema.copy_to(trainer.weights.own())
        network = whole(trainer.task.prior)
        if network is not None:
            found |= {f"{name}.{key}": value.detach().clone() for key, value in network.named_parameters()}
    return found


def train(
    pictures: Path,
    folder: Path,
    options: Options = OPTIONS,
    *,
    until: int = STEPS,
    writes: bool = True,
    compares: bool = False,
    **others: Any,
) -> dict[str, Tensor]:
    """Trains up to a step, and writes a checkpoint and Stage C, if anybody reads them. `Trainer.run` would also end the
    processes' connection."""
    trainer = make_trainer(pictures, folder, options, **others)
    while trainer.progress.step < until:
        trainer.step()
        if compares:
            assert compare_gradients(trainer.weights, trainer.batch(0))[0] < 1e-6
    if writes:
        trainer.save()
        trainer.review()
    return state_of(trainer)


def lower(pictures: Path) -> dict[str, Tensor]:
    """The predictions of a sharded network that computes in bfloat16, and of a bfloat16 network; dtypes of gradients."""
    task = make_task(pictures, dropout=0.0)
    batch = task.batch(0, 2, torch.Generator().manual_seed(0))
    reference = copy.deepcopy(task).to(torch.bfloat16)
    reference.weight.float()
    expected = reference(**batch)["errors"]
    shard(task, torch.bfloat16, compiled=False)
    outputs = task(**batch)
    outputs["loss"].backward()
    gradients = {parameter.grad.dtype for parameter in task.parameters() if parameter.requires_grad}
    assert gradients == {torch.float32}
    return {"made": outputs["errors"], "expected": expected.detach()}


class Shades(Dataset):
    """Pictures of 8x8 pixels, each of another shade."""

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        self.asked.extend(indices.tolist())
        return (indices / len(self)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def encoded(count: int) -> tuple[Tensor, Tensor]:
    """Encodes all pictures but the first, as floating-point numbers and as bytes. Processes share the work if it is large."""
    pictures = Shades([""] * count, train_tokenizer([""], SMALLEST_VOCABULARY), (8, 8), torch.device("cpu"))
    pictures.asked = []
    latents, rows = encode_pictures(
        pictures, range(1, count), (8, 8), lambda pixels: (pixels.mean(dim=3) / 3, (pixels[:, 0] * 255).byte())
    )
    pictures_of_others = set(range(1, count)).difference(pictures.asked)
    assert bool(pictures_of_others) == (dist.is_initialized() and count > 256), pictures_of_others
    return latents, rows


def main(folder: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    start_processes()
    pictures = folder / "pictures"
    for run in runs:
        if run == "encoded":
            latents, rows = encoded(600)
            few, _ = encoded(3)
            made = {"latents": latents, "rows": rows, "few": few}
            torch.save(made, folder / f"{run}-{dist.get_rank()}.pt")
            continue
        if run == "exact":
            made = train(pictures, folder / run, compares=True, dropout=0.0)
        elif run == "kept":
            made = train(pictures, folder / run, writes=False, dropout=0.0, recompute=0.5)
        elif run == "uninterrupted":
            made = train(pictures, folder / run, writes=False, dropout=0.2, weight="adaptive")
        elif run == "resumed":
            train(pictures, folder / run, until=2, dropout=0.2, weight="adaptive")
            made = train(pictures, folder / run, writes=False, dropout=0.2, weight="adaptive")
        elif run == "replicated":
            made = train(pictures, folder / run, REPLICATED, writes=False, compares=True, dropout=0.0)
        elif run == "replicated-halfway":
            made = train(pictures, folder / run, REPLICATED, until=2, dropout=0.0)
        elif run == "tokenizer":
            train_stage(folder / "config.toml", "tokenizer", folder / "own", folder / run)
            continue
        elif run == "lower":
            made = lower(pictures)
        elif run == "halfway":
            made = train(pictures, folder / run, until=2, dropout=0.0)
        elif run == "counted":
            counts = []
            for accumulate in (1, 3):
                options = replace(OPTIONS, accumulate=accumulate)
                trainer = make_trainer(pictures, folder / f"counted-{accumulate}", options, dropout=0.0)
                trainer.step()
                with Reductions() as reductions:
                    trainer.step()
                counts.append(reductions.seen)
            (folder / f"counts-{dist.get_rank()}.json").write_text(json.dumps(counts))
            (folder / f"draw-{dist.get_rank()}.json").write_text(json.dumps(torch.rand(1).item()))
            continue
        if dist.get_rank() == 0:
            torch.save(made, folder / f"{run}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
