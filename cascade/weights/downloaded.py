"""The parts of a download: their comparison with the Hub's checksums, their checks, and their place in a model folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cascade.networks.controlnet import ControlNet
from cascade.safety import FOLDER as SAFETY_CHECKER
from cascade.safety import SafetyChecker
from cascade.weights.components import CONTROLNETS, NETWORKS
from cascade.weights.errors import WeightsError
from cascade.weights.fitting import misfit
from cascade.weights.folder import ModelFolder
from cascade.weights.hashing import sha256
from cascade.weights.making import check_channels, empty_network, make
from cascade.weights.published import Part
from cascade.weights.reading import read_header
from cascade.weights.variants import controlnet_config
from cascade.weights.writing import link, save_component


def check_part(download: Path, part: Part, checksums: Mapping[str, str]) -> None:
    """Compare a part's files with the Hub's checksums, and make sure that they can be loaded as its component.

    Args:
        download: the folder of the download.
        part: the part.
        checksums: sha256 by path in that folder.

    Raises:
        WeightsError: a file is missing or damaged, or they cannot.
    """
    compare(download, {path: checksums[path] for path in part.paths})
    check_content(download, part)


def compare(download: Path, checksums: Mapping[str, str]) -> None:
    """Compare downloaded files with their sha256.

    Args:
        download: the folder of the download.
        checksums: sha256 by path in that folder.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    for path, expected in checksums.items():
        file = download / path
        if not file.is_file():
            raise WeightsError(f"{file} is missing: run scripts/download-weights again.")
        if sha256(file) != expected:
            raise WeightsError(f"{file} is damaged: delete it, and run scripts/download-weights again.")


def check_content(download: Path, part: Part) -> None:
    """Make sure that a part's files can be loaded as its component.

    Raises:
        WeightsError: they cannot.
    """
    files = [download / path for path in part.paths]
    if part.component == SAFETY_CHECKER:
        SafetyChecker.load(files[0].parent)
    elif part.component in CONTROLNETS:
        check_tensors(files[0], controlnet_of(files[0], part.component), part.dtype)
    elif part.dtype is None:
        ModelFolder.open(download).load_component(part.component)
    elif part.is_checkpoint:
        check_tensors(files[0], make(NETWORKS[part.component], {}), part.dtype)
    else:
        config, weights = files
        check_tensors(weights, empty_network(part.component, config), part.dtype)


def controlnet_of(file: Path, component: str) -> ControlNet:
    """The ControlNet in a file, on the meta device.

    Raises:
        WeightsError: the file holds no ControlNet, or one of another kind than `component`.
    """
    try:
        config = controlnet_config({name: shape for name, (shape, _) in read_header([file]).items()})
    except ValueError as error:
        raise WeightsError(f"{file} holds no published ControlNet. {error}") from error
    check_channels(file, component, config["in_channels"])
    return make(ControlNet, config)


def check_tensors(weights: Path, network: nn.Module, dtype: str) -> None:
    """Compare name, shape and dtype of every tensor in a file with the network's.

    Raises:
        WeightsError: a tensor differs. The sentence names the first one.
    """
    stored = read_header([weights])
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = misfit(expected, {name: shape for name, (shape, _) in stored.items()})
    if wrong is not None:
        raise WeightsError(f"{weights}{wrong}.")
    buffers = {name for name, _ in network.named_buffers()}
    for name, (_, kind) in stored.items():
        # BatchNorm's statistics may be float32, and its counters are integers.
        allowed = (dtype, "F32", "I64") if name in buffers else (dtype,)
        if name in expected and kind not in allowed:
            raise WeightsError(f"{weights}: {name} has the dtype {kind} instead of {dtype}.")


def place(download: Path, part: Part, folder: Path) -> None:
    """Make a component's folder: links to the published files, or a converted single-file checkpoint."""
    if part.is_checkpoint:
        save_component(folder, ModelFolder.open(download).load_component(part.component), torch.float32)
        return
    folder.mkdir()
    for path in part.paths:
        link(download / path, folder / Path(path).name.replace(".bf16.", "."))
