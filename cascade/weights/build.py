"""Makes a model folder of a download: each component once, checked against this package's networks before it counts.

What was published in the standard form is kept as it is, bit for bit: files are linked where the disk allows it, so a
folder beside its download takes no room of its own. The authors' single files are converted. The folder appears when it
is complete; what an older one held besides is kept.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cascade.networks.controlnet import ControlNet
from cascade.safety import FOLDER as SAFETY_CHECKER
from cascade.safety import SafetyChecker
from cascade.weights.folder import (
    CONTROLNETS,
    IGNORED_KEYS,
    NETWORKS,
    PUBLISHED_LICENSE,
    PUBLISHED_SAMPLER,
    PUBLISHED_SIZE,
    ModelFolder,
    WeightsError,
    check_channels,
    empty_network,
    replacement,
    save_component,
    write_model_json,
)
from cascade.weights.manifest import Manifest, sha256
from cascade.weights.published import ALWAYS, PARTS, Part
from cascade.weights.single_file import controlnet_config

logger = logging.getLogger(__name__)

STAGES = ("prior", "decoder")


def save_model(download: Path, target: Path) -> None:
    """Make a model folder, or add to the one that is there, of what a download's ``download.json`` lists.

    Nothing is written before all of it has been checked.

    Args:
        download: the folder of the download.
        target: the model folder.

    Raises:
        DownloadError: there is no complete download.
        WeightsError: a file is missing, differs from the Hub's, or does not hold the tensors that it must; or `target`
            is something other than a model folder.
        OSError, SafetensorError: the folder cannot be written.
    """
    manifest = Manifest.read(download)
    parts = [PARTS[name] for name in manifest.parts]
    made = {part.component for part in parts}
    missing = [name for name in (*ALWAYS, *STAGES) if name not in made and not (target / name).is_dir()]
    if missing:
        raise WeightsError(
            f"{download} has no {', '.join(missing)}, and neither has {target}: run scripts/download-weights without "
            "--only."
        )
    about = describe(manifest.parts, target)
    for part in parts:
        logger.info("Checking %s.", part.component)
        check_files(download, part, manifest.files)
        check_content(download, part)
    with replacement(target, without=made, copy=link) as folder:
        for part in parts:
            place(download, part, folder / part.component)
        write_model_json(folder, **about)
        ModelFolder.open(folder)


def describe(parts: list[str], target: Path) -> dict[str, Any]:
    """What ``model.json`` will say besides the files: as published, or as it was if no stage is replaced."""
    if target.is_dir() and any(target.iterdir()) and not (target / "model.json").is_file():
        raise WeightsError(f"{target} holds something other than a model: name another folder with --output.")
    if not any(PARTS[name].component in STAGES for name in parts) and target.is_dir():
        old = ModelFolder.open(target)
        return {"name": old.name, "license": old.license, "native_size": old.native_size, "sampler": old.sampler}
    lite = [PARTS[name].component for name in parts if name.endswith("_lite")]
    return {
        "name": f"Stable Cascade (lite {' and '.join(lite)})" if lite else "Stable Cascade",
        "license": PUBLISHED_LICENSE,
        "native_size": PUBLISHED_SIZE,
        "sampler": PUBLISHED_SAMPLER,
    }


def check_files(download: Path, part: Part, checksums: dict[str, str]) -> None:
    """Compare a part's files with what the Hub said of them."""
    for path in part.paths:
        file = download / path
        if not file.is_file():
            raise WeightsError(f"{file} is missing: run scripts/download-weights again.")
        if sha256(file) != checksums[path]:
            raise WeightsError(f"{file} is damaged: delete it, and run scripts/download-weights again.")


def check_content(download: Path, part: Part) -> None:
    """Make sure that a part is what its component is read from."""
    files = [download / path for path in part.paths]
    if part.component == SAFETY_CHECKER:
        SafetyChecker.load(files[0].parent)
    elif part.component in CONTROLNETS:
        check_tensors(files[0], controlnet_of(files[0], part.component), part.dtype)
    elif part.dtype is None:
        ModelFolder.open(download).load_component(part.component)
    elif part.is_checkpoint:
        with torch.device("meta"):
            check_tensors(files[0], NETWORKS[part.component](), part.dtype)
    else:
        config, weights = files
        check_tensors(weights, empty_network(part.component, config), part.dtype)


def controlnet_of(file: Path, component: str) -> ControlNet:
    """The ControlNet that a file holds, on the meta device.

    Raises:
        WeightsError: it holds none, or one that reads other controls than the component's.
    """
    try:
        config = controlnet_config({name: shape for name, (shape, _) in read_header(file).items()})
    except ValueError as error:
        raise WeightsError(f"{file} holds no published ControlNet. {error}") from error
    check_channels(file, component, config["in_channels"])
    with torch.device("meta"):
        return ControlNet(**config)


def check_tensors(weights: Path, network: nn.Module, dtype: str) -> None:
    """Compare name, shape and dtype of every tensor in a file with a network's.

    Raises:
        WeightsError: they differ; it names the first that does.
    """
    expected, stored = network.state_dict(), read_header(weights)
    parameters = {name for name, _ in network.named_parameters()}
    for name in expected:
        if name not in stored:
            raise WeightsError(f"{weights} has no tensor {name}.")
    for name, (shape, kind) in stored.items():
        if name not in expected:
            if name.endswith(IGNORED_KEYS):
                continue
            raise WeightsError(f"{weights} has a tensor {name}, which is none of its network's.")
        if shape != tuple(expected[name].shape):
            raise WeightsError(f"{weights}: {name} has the shape {shape} instead of {tuple(expected[name].shape)}.")
        # The statistics of a normalisation may be kept in float32, and counters are integers.
        allowed = (dtype,) if name in parameters else (dtype, "F32", "I64")
        if kind not in allowed:
            raise WeightsError(f"{weights}: {name} has the dtype {kind} instead of {dtype}.")


def read_header(weights: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a safetensors file, by name."""
    try:
        with safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
            return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{weights} is truncated or no safetensors file: {error}") from error


def place(download: Path, part: Part, folder: Path) -> None:
    """Make a component's folder of its part: as published, but a single file gets the standard form."""
    if part.is_checkpoint:
        save_component(folder, ModelFolder.open(download).load_component(part.component), torch.float32)
        return
    folder.mkdir()
    for path in part.paths:
        link(download / path, folder / Path(path).name.replace(".bf16.", "."))


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file a second name where the disk allows that, else copy it."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
