"""A model folder becomes the networks of a `Cascade`, each where the memory mode wants it."""

import logging
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch

from cascade import kernels
from cascade.running.cache import ResidentWeights, WeightCache
from cascade.running.device import check_precision
from cascade.running.packing import HostWeights
from cascade.running.placement import ALWAYS, GIB, MemoryMode, available, choose_memory
from cascade.running.precompile import precompile
from cascade.weights import CONTROLNETS, NEEDED, NETWORKS, ModelFolder
from cascade.weights.agreement import check_processors
from cascade.weights.base import FileWeights

logger = logging.getLogger(__name__)

# Networks that adapters change.
ADAPTED = ("prior", "decoder", "text_encoder")
# Networks with kernels of their own.
KERNELS = ("prior", "decoder", "vqgan")
OPTIONAL = ("feature_extractor", "image_encoder", "ip_adapter", "effnet", "previewer", *CONTROLNETS)


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a model folder holds.

    Attributes:
        folder: the opened folder.
        parts: tokenizer, networks and image processor, by name.
        weights: where the networks' weights are.
        base: reads the weights of networks again that adapters change.
    """

    folder: ModelFolder
    parts: dict[str, Any]
    weights: ResidentWeights
    base: FileWeights


def load_parts(
    folder: str | PathLike[str],
    device: torch.device,
    dtype: torch.dtype,
    memory: str,
    lite: Collection[str],
    precision: str,
) -> Loaded:
    """Read a model folder. The device is the current one.

    Args: see `Cascade.load`.

    Raises:
        WeightsError: something is missing from the folder, damaged, or does not fit the rest.
        SettingError: there is no such memory mode or precision.
    """
    check_precision(precision)
    opened = ModelFolder.open(folder, lite=lite)
    opened.require()
    precision = _usable(opened.precision() if precision == "auto" else precision, device, dtype)
    names = (*NEEDED, *(name for name in OPTIONAL if name in opened))
    mode = _memory_mode(memory, opened, names, device, dtype, precision)
    resident = mode.name == "resident"
    parts, waiting, seconds = {}, {}, {}
    base = FileWeights(opened.standard_files(ADAPTED))  # first: it notes how the files are that are loaded

    def load(name: str) -> None:
        start = time.perf_counter()
        waits = not resident and name in NETWORKS and name not in ALWAYS
        place = "cpu" if waits else device
        parts[name] = opened.load_component(name, device=place, dtype=dtype, precision=precision)
        if name in NETWORKS:
            kernels.use_kernels(parts[name], kernels.choose(device, dtype).name)
        if waits:
            waiting[name] = HostWeights(parts[name], pin=True)
        seconds[name] = time.perf_counter() - start

    # Kernels are prepared as soon as their networks are on the device: on the GPU, while the other networks are read. The
    # weight cache needs all networks.
    first = KERNELS if resident else names
    rest = [name for name in names if name not in first]
    with ThreadPoolExecutor(1, "kernels") as thread:
        thread.submit(kernels.choose, device, dtype)  # imports Triton, while weights are read
        for name in first:
            load(name)
        weights = ResidentWeights(device) if resident else WeightCache(waiting, device, mode)
        prepared = thread.submit(precompile, [parts["prior"], parts["decoder"]], parts["vqgan"])
        for name in rest:
            load(name)
        prepared.result()
    check_processors(parts, opened.root)
    logger.info("Seconds to load: %s.", ", ".join(f"{name} {taken:.2f}" for name, taken in seconds.items()))
    return Loaded(opened, parts, weights, base)


def _usable(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """The precision, or "full" if this machine cannot multiply in it. Logs why."""
    if precision == "fp8" and (why_not := kernels.lacks_e4m3(device, dtype)):
        logger.warning("Precision: full instead of fp8, because %s.", why_not)
        return "full"
    return precision


def _memory_mode(
    memory: str,
    opened: ModelFolder,
    names: Collection[str],
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
) -> MemoryMode:
    """The memory mode for a model folder. Logs why."""
    sizes = {name: opened.size(name, dtype, precision=precision) for name in names if name in NETWORKS}
    if device.type != "cuda":
        choose_memory(memory, sizes, 0, dtype.itemsize)  # refuses unknown modes
        return MemoryMode("resident")
    free = available(device)
    mode = choose_memory(memory, sizes, free, dtype.itemsize)
    total, largest = (number(sizes.values()) / GIB for number in (sum, max))
    logger.info(
        "Memory: %s, for %s: the networks have %.2f GiB, the largest %.2f GiB; of the GPU %.2f GiB are free.",
        mode.name,
        memory,
        total,
        largest,
        free / GIB,
    )
    return mode
