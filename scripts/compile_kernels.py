"""Compiles the Triton kernels of the published networks, full and lite, and of the miniature, and the bytecode of this
program: see `scripts/compile-kernels`.

Networks that differ only in their weights, such as fine-tuned ones, have the same kernels.
"""

import argparse
import copy
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from cascade.kernels import load
from cascade.kernels.compiled import version_folder
from cascade.kernels.compiling import ARCHITECTURES, compile_kernels, compile_launchers
from cascade.kernels.e4m3 import CAPABILITY
from cascade.networks.base import without_values
from cascade.networks.eight_bits import GROUP, EightBits, group_of, rounded_names
from cascade.networks.eight_bits import NETWORKS as EIGHT_BIT_NETWORKS
from cascade.networks.precisions import use_forms, wanted_forms
from cascade.networks.unet import StableCascadeUNet
from cascade.running.precompile import jobs_of
from cascade.weights import ModelFolder
from cascade.weights.making import empty_network
from cascade.weights.reading import read_header
from cascade.weights.variants import VARIANTS
from scripts.environment import ROOT

# The Python of the container, by cog.yaml.
PYTHON = "python3.12"
UNETS = ("prior", "prior_lite", "decoder", "decoder_lite")


def jobs(
    models: list[Path], dtype: torch.dtype, *, published: bool = True, e4m3: bool = False
) -> list[Callable[[], object]]:
    """Functions that run all kernels of the networks in the model folders, and of the published ones, on the meta device.

    e4m3: whether Stages B and C also run in the precision fp8.
    """
    sets = []
    groups = {GROUP}  # of weights in 8 bits, in the published networks
    if published:
        variants = {variant.name: variant for variant in VARIANTS}
        with torch.device("meta"), without_values():
            found = {name: variants[name].network(**variants[name].config) for name in (*UNETS, "vqgan")}
        sets.append(([found[name] for name in UNETS], found["vqgan"]))
    for folder in models:
        opened = ModelFolder.open(folder)
        prior, decoder, vqgan = (
            empty_network(name, opened.parts[name] / "config.json") for name in ("prior", "decoder", "vqgan")
        )
        sets.append(([prior, decoder], vqgan))
        for name, files in opened.standard_files(EIGHT_BIT_NETWORKS).items():
            header = read_header(files)
            groups |= {group_of(header[key][0][1]) for key in rounded_names(header, name)}
    for unets, vqgan in sets:
        for network in (*unets, vqgan):
            network.to(dtype).eval().use_kernels("triton")
    if e4m3:
        sets += [([in_fp8(unet) for unet in unets], vqgan) for unets, vqgan in sets]
    return [job for unets, vqgan in sets for job in jobs_of(unets, vqgan, large=True)] + [
        partial(load("triton").dequantise, *in_groups(size), dtype) for size in sorted(groups)
    ]


def in_fp8(unet: StableCascadeUNet) -> StableCascadeUNet:
    """A copy of a network on the meta device, in the precision fp8."""
    made = copy.deepcopy(unet)
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    use_forms(made, wanted_forms(shapes, "prior", "fp8"))  # the same for both stages
    made.use_kernels("triton")
    return made


def in_groups(size: int) -> EightBits:
    """A row of weights in 8 bits without values, in groups of this size."""
    with torch.device("meta"):
        return EightBits(torch.empty(1, 16 * size, dtype=torch.int8), torch.empty(1, 16, dtype=torch.bfloat16))


def compiled(architecture: int, models: list[Path], dtype: torch.dtype) -> tuple[int, set[str], float]:
    """Compile the kernels for an architecture. Returns their number, their launchers' sources, and the seconds."""
    start = time.perf_counter()
    logging.disable(logging.WARNING)
    e4m3 = dtype == torch.bfloat16 and divmod(architecture, 10) >= CAPABILITY
    count, sources = compile_kernels(architecture, jobs(models, dtype, e4m3=e4m3))
    return count, sources, time.perf_counter() - start


def compile_modules(python: str) -> None:
    """Compile the modules that the container imports to bytecode, which is used if the source has not changed.

    The bytecode is checked by the source's hash, not by its time, which a copy into a container may change.
    """
    options = ["-q", "--invalidation-mode", "checked-hash"]
    subprocess.run([python, "-m", "compileall", *options, "cascade", "serving", "predict.py"], cwd=ROOT, check=True)


def main(arguments: list[str] | None = None) -> None:
    """Compile for all architectures, one process each, then the launchers."""
    parser = argparse.ArgumentParser(
        prog="scripts/compile-kernels", description="Compile the GPU kernels before a container is built. Needs no GPU."
    )
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=ARCHITECTURES, metavar="N", help="90 for an H100; default: all"
    )
    parser.add_argument(
        "--models", type=Path, nargs="*", default=[ROOT / "weights" / "mini"], help="further model folders"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the networks")
    parser.add_argument(
        "--python", help=f"the Python of the container; default: this one, and {PYTHON} if there is one"
    )
    options = parser.parse_args(arguments)
    workers = min(len(options.architectures), os.cpu_count() or 1)
    work = partial(compiled, models=options.models, dtype=getattr(torch, options.dtype))
    sources: set[str] = set()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as processes:
        for architecture, done in zip(options.architectures, processes.map(work, options.architectures), strict=True):
            count, of_it, seconds = done
            sources |= of_it
            print(f"sm_{architecture}: {count} kernels in {seconds:.0f} s.", flush=True)
    for python in [options.python] if options.python else dict.fromkeys((sys.executable, shutil.which(PYTHON))):
        if python is None:
            print(
                f"There is no {PYTHON}, so the container's first start compiles the launchers, which needs gcc there."
            )
            continue
        try:
            print(f"{python}: {compile_launchers(sources, python)} launchers.")
            compile_modules(python)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{python}: no launchers, so the first start compiles them, which needs gcc there. {error}")
    files = [file for file in version_folder().rglob("*") if file.is_file()]
    print(f"{version_folder()}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
