"""Makes a component of a model from its files: a network from its configuration and tensors, or a tokenizer."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.networks.base import Network, without_values
from cascade.networks.controlnet import ControlNet
from cascade.networks.precisions import stored_forms, use_forms
from cascade.weights.components import CONTROLNETS, NETWORKS, PROCESSOR_FILES, PROCESSORS
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.fitting import OPTIONAL_KEYS, current_names, misfit
from cascade.weights.reading import read_json
from cascade.weights.single_file import convert, split
from cascade.weights.variants import controlnet_config, what_it_is


def standard_network(component: str, config_path: Path, weights: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a network in evaluation mode from a ``config.json`` and the tensors of `weights`, on their device.

    Raises:
        WeightsError: the tensors do not fit the configuration.
    """
    network = empty_network(component, config_path)
    use_forms(network, stored_forms(tensors))
    wrong = _what_is_wrong(network, tensors)
    if wrong is not None:
        raise WeightsError(f"{weights}{wrong}, by {config_path}{_what_else(component, tensors)}.")
    return filled(network, tensors)


def single_file_network(component: str, path: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Make a network of the published size, in evaluation mode, from the authors' file, which has no configuration.

    Raises:
        WeightsError: the tensors are not those of the published network.
    """
    network, config = NETWORKS[component], {}
    try:
        tensors = convert(tensors)
        if network is ControlNet:  # the kinds differ in their configuration
            config = controlnet_config(_shapes(tensors))
        return build(tensors, network, config)
    except ValueError as error:
        raise WeightsError(f"{path} is not the published {component}: {error}") from error


def empty_network(component: str, config_path: Path) -> nn.Module:
    """Make a network from a ``config.json``, with parameters on the meta device, so without values.

    Args:
        component: a key of ``NETWORKS``.
        config_path: the ``config.json``.

    Raises:
        WeightsError: the file is missing, is not JSON, or does not describe such a network.
    """
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise WeightsError(f"{config_path} does not describe the {component}: it is not a JSON object.")
    with torch.device("meta"), without_values():
        try:
            return NETWORKS[component].from_config(current_names(config))
        except Exception as error:  # networks raise various errors for wrong settings
            said = f"it lacks {error}" if isinstance(error, KeyError) else shortened(error).rstrip(".")
            raise WeightsError(f"{config_path} does not describe the {component}: {said}.") from error


def make(network: type[nn.Module], config: Mapping[str, Any], device: str | torch.device = "meta") -> nn.Module:
    """Make a network from its class and configuration. On the meta device, its parameters have no values."""
    empty = without_values() if torch.device(device).type == "meta" else contextlib.nullcontext()
    with torch.device(device), empty:
        return network(**config)


def build(state_dict: Mapping[str, Tensor], network: type[Network], config: Mapping[str, Any]) -> Network:
    """Make a network in evaluation mode from a converted state dict. Uses its tensors without a copy.

    Args:
        state_dict: the tensors of one component.
        network, config: its class and configuration.

    Raises:
        ValueError: a tensor is missing, surplus or of another shape. The sentence names the first one.
    """
    model = make(network, config)
    wrong = _what_is_wrong(model, state_dict)
    if wrong is not None:
        raise ValueError(f"it does not fit {network.__name__}:{wrong.removeprefix(':')}.")
    return filled(model, state_dict)


def filled(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors into an empty network, without a copy, and set evaluation mode. They must fit, see `misfit`."""
    expected = network.state_dict()
    device = next(iter(tensors.values())).device
    counters = {key: torch.tensor(0, device=device) for key in expected if key.endswith(OPTIONAL_KEYS)}
    known = {key: tensor for key, tensor in tensors.items() if key in expected}
    network.load_state_dict({**counters, **known}, assign=True)
    return network.eval()


def check_channels(weights: Path, component: str, channels: int) -> None:
    """Make sure that a ControlNet reads the number of channels that its kind has.

    Raises:
        WeightsError: it does not, so it is a ControlNet of another kind.
    """
    if channels != CONTROLNETS[component]:
        raise WeightsError(
            f"{weights} is not a {component}: it reads {channels} channels, not {CONTROLNETS[component]}."
        )


def load_processor(component: str, folder: Path) -> Any:
    """Load the tokenizer or image processor in a folder.

    Raises:
        WeightsError: a file is missing or damaged.
    """
    if not any(all((folder / name).is_file() for name in names) for names in PROCESSOR_FILES[component]):
        wanted = ", or ".join(" and ".join(names) for names in PROCESSOR_FILES[component])
        raise WeightsError(f"{folder} lacks {wanted}.")
    try:
        return PROCESSORS[component].from_pretrained(folder)
    # The tokenizers library raises a bare Exception, or if its Rust code panics, a PanicException, which is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise WeightsError(f"{folder} holds no readable {component}: {shortened(error)}") from error


def _what_else(component: str, tensors: Mapping[str, Tensor]) -> str:
    """The end of an error message: the model that a misfitting file holds; "" if it is unknown."""
    try:
        (held,) = split({key: tensor.to("meta") for key, tensor in tensors.items()}).values()
        return f"; it is {what_it_is(held)}"
    except ValueError as error:
        said = str(error)
        return f"; {said.rstrip('.')}" if said.startswith("it is ") else ""


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _what_is_wrong(network: nn.Module, stored: Mapping[str, Tensor]) -> str | None:
    """The end of a sentence on the first tensor that does not fit: see `misfit`, or whole numbers where the network has others;
    None: all fit."""
    expected = network.state_dict()
    wrong = misfit(_shapes(expected), _shapes(stored))
    if wrong is not None:
        return wrong
    for key, tensor in expected.items():
        if key in stored and tensor.is_floating_point() and not stored[key].is_floating_point():
            kind = str(stored[key].dtype).removeprefix("torch.")
            return f": {key} has whole numbers ({kind}), which its network does not read"
    return None
