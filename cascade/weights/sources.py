"""Finds components in the user's own files and folders, and writes component folders from them.

Reads three kinds: a safetensors file of any name, with one or several networks (`single_file`), in shards or not; a
component's folder in the standard form; a folder of such folders, like a diffusers pipeline or a model folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cascade.networks.controlnet import KINDS, ControlNet
from cascade.weights.components import COMPONENTS, PROCESSORS
from cascade.weights.errors import WeightsError, readable, shortened
from cascade.weights.fitting import misfit
from cascade.weights.making import check_channels, empty_network, filled, load_processor, make
from cascade.weights.names import PICKLES, STEMS, SUFFIX
from cascade.weights.reading import (
    find_weights,
    no_weights,
    pickle_error,
    read_empty,
    read_index,
    read_tensors,
    unreadable,
)
from cascade.weights.single_file import StateDict, split
from cascade.weights.variants import TITLES, controlnet_config, variant_of, what_it_is
from cascade.weights.writing import save_component

SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors)", re.IGNORECASE)
# A component's names in a folder of folders. diffusers' combined pipeline puts "prior_" before the prior's components.
PLACES = {component: (component, f"{component}_lite", f"prior_{component}") for component in COMPONENTS}
# Single files in the published decoder repository.
FILES = {
    "effnet": "effnet_encoder.safetensors",
    "previewer": "previewer.safetensors",
    **{f"controlnet_{kind}": f"controlnet/{kind}.safetensors" for kind in KINDS},
}
# Published in bfloat16. Files in float32 are stored in bfloat16, too: half the size, and a GPU computes in 16 bits anyway.
LARGE = ("prior", "decoder", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class Source:
    """A component in the user's own file or folder.

    Attributes:
        component: its name in a model folder.
        origin: the file or folder, for errors.
        files: its safetensors files; empty for a tokenizer or feature extractor.
        config: its ``config.json``, if there is one.
    """

    component: str
    origin: Path
    files: tuple[Path, ...] = ()
    config: Path | None = None

    @property
    def key(self) -> str:
        """The component's name in `single_file`, which does not tell ControlNets apart."""
        return "controlnet" if self.component.startswith("controlnet_") else self.component

    def check(self, known: Sequence[Path] = ()) -> nn.Module | None:
        """Make sure that the files fit the component. Reads no weights.

        Args:
            known: ``config.json`` files to try, for files without one. The published configurations are tried last.

        Returns:
            The network on the meta device; None for a tokenizer or feature extractor.

        Raises:
            WeightsError: the files do not fit. The sentence names the first problem.
        """
        if self.component in PROCESSORS:
            load_processor(self.component, self.origin)
            return None
        tensors = _split(self.origin, read_empty(self.files), self.key)[self.key]
        network = self._network(tensors, known)
        buffers = {name for name, _ in network.named_buffers()}
        for name in network.state_dict():
            if name not in buffers and not tensors[name].is_floating_point():
                kind = str(tensors[name].dtype).removeprefix("torch.")
                raise WeightsError(f"{self.origin}: {name} is stored as {kind}; only floating point is read.")
        if isinstance(network, ControlNet):
            check_channels(self.origin, self.component, network.config.in_channels)
        return network

    def _network(self, tensors: Mapping[str, Tensor], known: Sequence[Path]) -> nn.Module:
        """Make the empty network that fits the tensors, which may be on any device."""
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        configs = [self.config] if self.config is not None else known
        wrong = alike = None
        for config in configs:
            network = empty_network(self.component, config)
            expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
            wrong = misfit(expected, shapes)
            if wrong is None:
                return network
            if 2 * sum(shapes.get(key) == shape for key, shape in expected.items()) > len(expected):
                alike = f"{wrong}, by {config}"
        if self.config is not None:
            raise WeightsError(f"{self.origin}{wrong}, by {self.config.name}; it is {what_it_is(tensors)}.")
        try:
            if self.key == "controlnet":
                network = make(ControlNet, controlnet_config(shapes))
            else:
                variant = variant_of(tensors)
                network = make(variant.network, variant.config)
        except ValueError as error:
            if alike is not None:
                raise WeightsError(f"{self.origin}{alike}.") from error
            raise WeightsError(
                f"{self.origin} does not fit, and has no config.json beside it: {str(error).rstrip('.')}."
            ) from error
        wrong = misfit({key: tensor.shape for key, tensor in network.state_dict().items()}, shapes)
        if wrong is not None:
            raise WeightsError(f"{self.origin}{wrong}; it is like {what_it_is(tensors)}, but not quite.")
        return network

    def write(self, folder: Path, known: Sequence[Path] = ()) -> None:
        """Write the component's folder, in the standard form. Stores `LARGE` components in 16 bits.

        Args:
            folder: the directory; it must not exist.
            known: see :meth:`check`.

        Raises:
            WeightsError: a weight is infinite or NaN.
        """
        if self.component in PROCESSORS:
            save_component(folder, load_processor(self.component, self.origin), torch.bfloat16)
            return
        tensors = _split(self.origin, read_tensors(self.files), self.key)[self.key]
        # No component is stored in double precision.
        tensors = {name: one.float() if one.dtype == torch.float64 else one for name, one in tensors.items()}
        dtype = _dtype(self.component, tensors)
        for name, tensor in tensors.items():
            if not tensor.to(dtype).isfinite().all():
                raise WeightsError(f"{self.origin} cannot be used: {name} holds infinite or NaN values.")
        save_component(folder, filled(self._network(tensors, known), tensors), dtype)


def _dtype(component: str, tensors: StateDict) -> torch.dtype:
    """The dtype of most of the weights; for `LARGE` components at most 16 bits."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return torch.bfloat16 if component in LARGE and most.itemsize > 2 else most


def find(path: Path, wanted: str | None = None) -> dict[str, Source]:
    """Find the components in a file or folder.

    Args:
        path: a file or folder, see the module.
        wanted: a component that it must hold; "controlnet" is any of the three.

    Returns:
        The components by their names in a model folder.

    Raises:
        WeightsError: there is no such file or folder, or it holds something else. The sentence names it, if it is known.
    """
    with readable(path):
        if not path.exists():
            raise WeightsError(f"There is no file or folder {path}.")
        return _found(path, wanted)


def _found(path: Path, wanted: str | None) -> dict[str, Source]:
    if path.name in ("model_index.json", "model.json", "config.json"):
        path = path.parent
    if path.is_dir():
        found = _in_folder(path, wanted)
    elif path.suffix.lower() == ".json":
        found = _in_files(path, read_index(path), None)
    else:
        files = _shards(path)  # first: it raises for other files than safetensors
        found = _in_files(path, files, _config_of(path.parent) if path.name.startswith(STEMS) else None)
    if wanted is not None and not any(name == wanted or name.startswith(f"{wanted}_") for name in found):
        titles = " and ".join(_title(source.key) for source in found.values())
        option = "--" + next(source.key for source in found.values()).replace("_", "-")
        raise WeightsError(f"{path} is not {_title(wanted)}: it holds {titles}; see {option}.")
    return found


def _title(key: str) -> str:
    """A component's name in errors."""
    return TITLES.get(key, f"the {key.replace('_', ' ')}")


def _in_folder(folder: Path, wanted: str | None) -> dict[str, Source]:
    """Find the components in a component's folder, or in a folder of such folders."""
    snapshot = folder / "refs" / "main"  # in huggingface_hub's cache
    if snapshot.is_file():
        return _in_folder(folder / "snapshots" / snapshot.read_text(encoding="utf-8").strip(), wanted)
    found = {}
    for component, names in PLACES.items():
        for place in (folder / name for name in names):
            if place.is_dir() and component in PROCESSORS:
                found.setdefault(component, Source(component, place))
            elif place.is_dir() and (files := find_weights(place)):
                found.setdefault(component, Source(component, place, tuple(files), _config_of(place)))
    if found:
        files = {component: folder / file for component, file in FILES.items() if component not in found}
        for component, file in files.items():
            if file.is_file():
                found[component] = Source(component, file, (file,))
        return found
    if wanted in PROCESSORS:
        return {wanted: Source(wanted, folder)}
    files = find_weights(folder)
    if not files:
        raise no_weights(folder)
    return _in_files(folder, files, _config_of(folder))


def _config_of(folder: Path) -> Path | None:
    config = folder / "config.json"
    return config if config.is_file() else None


def _in_files(origin: Path, files: Sequence[Path], config: Path | None) -> dict[str, Source]:
    """Find the components in the safetensors files of one checkpoint."""
    found = {}
    for key, tensors in _split(origin, read_empty(files)).items():
        component = key
        if key == "controlnet":
            component = _controlnet(origin, tensors, config)
        found[component] = Source(component, origin, tuple(files), config)
    return found


def _controlnet(origin: Path, tensors: StateDict, config: Path | None) -> str:
    """The component's name for a ControlNet, by the channels that it reads."""
    stem = next((tensors[key] for key in ("backbone.0.0.weight", "backbone.0.weight") if key in tensors), None)
    channels = 0 if stem is None or stem.ndim < 2 else stem.shape[1]
    kind = next((kind for kind, reads in KINDS.items() if reads == channels), None)
    if kind is None:
        known = ", ".join(f"{reads} ({kind})" for kind, reads in KINDS.items())
        raise WeightsError(f"{origin} is a ControlNet that reads {channels} channels; it must read {known}.")
    return f"controlnet_{kind}"


def _split(origin: Path, tensors: StateDict, only: str | None = None) -> dict[str, StateDict]:
    try:
        return split(tensors, only)
    except ValueError as error:
        raise WeightsError(f"{origin} cannot be used: {shortened(error, 250)}") from error


def _shards(path: Path) -> list[Path]:
    """All shards of the checkpoint that a file belongs to, or the file itself."""
    _check_kind(path)
    shard = SHARD.fullmatch(path.name)
    if shard is None:
        return [path]
    index = path.with_name(f"{shard[1]}{shard[2]}.index.json")
    if index.is_file():
        return read_index(index)
    return sorted(
        other for other in path.parent.iterdir() if (match := SHARD.fullmatch(other.name)) and match[1] == shard[1]
    )


def _check_kind(path: Path) -> None:
    """Raise a WeightsError for a file that is not safetensors by its content, whatever its name."""
    try:
        with safe_open(path, framework="pt"):
            return
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"GGUF":
            raise WeightsError(f"{path} is a GGUF file; only safetensors files are opened.") from error
        if path.suffix.lower() in PICKLES or start.startswith((b"PK", b"\x80")):
            raise pickle_error(path) from error
        if path.suffix.lower() == SUFFIX:
            raise unreadable(path, error) from error
        raise WeightsError(f"{path} is not a safetensors file, the only kind that is opened.") from error
