"""Writes model folders: components in the standard form, and ``model.json``. A folder gets its name when it is complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.networks.base import Network
from cascade.networks.eight_bits import is_in_8_bits
from cascade.weights.components import COMPONENTS, component_files
from cascade.weights.hashing import sha256
from cascade.weights.names import SUFFIX
from cascade.weights.reading import read_json
from cascade.weights.settings import StageSettings
from cascade.weights.sums import ALGORITHM, PIECE, sums_of


def save_model_folder(
    folder: str | os.PathLike[str],
    components: Mapping[str, Any],
    *,
    name: str,
    license: str,
    native_size: int,
    sampler: Mapping[str, StageSettings],
    stage_a_scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    extras: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write components into a model folder, new or existing, and ``model.json`` with their checksums.

    Writes a temporary folder and renames it when it is complete, so a killed process leaves the old folder intact. Other
    files of an existing folder (other components, a README) are kept.

    Args:
        folder: the directory.
        components: networks, tokenizer and image processor by name, see ``COMPONENTS``.
        name, license, native_size, sampler, stage_a_scale: see ``ModelFolder``.
        dtype: dtype of the stored parameters. Buffers, such as BatchNorm's statistics, keep theirs.
        extras: content of files in folders of ``EXTRAS``, by path.
    """
    unknown = set(components) - set(COMPONENTS)
    if unknown:
        raise ValueError(f"There is no component {sorted(unknown)[0]!r}; there are {', '.join(COMPONENTS)}.")
    with replacement(folder, without=components) as made:
        for component, item in components.items():
            save_component(made / component, item, dtype)
        for path, content in extras.items():
            (made / path).parent.mkdir(exist_ok=True)
            (made / path).write_bytes(content)
        about = {"name": name, "license": license, "native_size": native_size, "stage_a_scale": stage_a_scale}
        write_model_json(made, sampler=sampler, **about)


@contextlib.contextmanager
def replacement(
    folder: str | os.PathLike[str],
    *,
    without: Collection[str] = (),
    copy: Callable[[str, str], object] = shutil.copy2,
) -> Iterator[Path]:
    """A temporary folder next to ``folder``. It replaces ``folder`` when the block ends, and is deleted if the block raises.

    Args:
        folder: the directory; it need not exist.
        without: names in ``folder`` that are not copied to the new one. Everything else is copied.
        copy: copies a file.
    """
    target = Path(folder).resolve()  # so that a symbolic link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "new"
        if target.is_dir():
            shutil.copytree(
                target,
                made,
                ignore=lambda where, names: set(names).intersection(without) if Path(where) == target else (),
                copy_function=copy,
            )
        made.mkdir(exist_ok=True)
        yield made
        if target.is_dir():
            target.rename(Path(scratch) / "old")
        made.rename(target)


def link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Make a hard link to a file, or a copy where the disk does not allow links."""
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def save_component(folder: Path, item: Any, dtype: torch.dtype) -> None:
    """Write a network (parameters in ``dtype``, or in 8 bits), a tokenizer or an image processor into a new folder."""
    folder.mkdir(parents=True)
    if not isinstance(item, nn.Module):
        item.save_pretrained(folder)
        return
    buffers = {name for name, _ in item.named_buffers()}
    state = item.state_dict()

    def is_converted(key: str, tensor: Tensor) -> bool:
        return key not in buffers and tensor.is_floating_point() and not is_in_8_bits(key, state)

    tensors = {
        key: tensor.detach().to("cpu", dtype if is_converted(key, tensor) else tensor.dtype).contiguous()
        for key, tensor in state.items()
    }
    if isinstance(item, Network):
        item.save_config(folder)
        file = f"{item.weights_name}.safetensors"
    else:  # a network of transformers, from training
        item.config.save_pretrained(folder)
        file = "model.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    _forget_origin(folder / "config.json")
    shutil.copymode(folder / "config.json", folder / file)  # safetensors makes it readable by the owner only


def _forget_origin(config_path: Path) -> None:
    """Remove the path that the network was loaded from, which diffusers and transformers store in ``config.json``."""
    config = read_json(config_path)
    if config.pop("_name_or_path", None) is not None:
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model_json(
    folder: str | os.PathLike[str],
    *,
    name: str,
    license: str,
    native_size: int,
    sampler: Mapping[str, StageSettings],
    stage_a_scale: float | None = None,
) -> None:
    """Write ``model.json`` for the components in ``folder``, with the checksums of all of their files."""
    root = Path(folder)
    files = component_files(root)
    content = {
        "name": name,
        "license": license,
        "native_size": native_size,
        **({} if stage_a_scale is None else {"stage_a_scale": stage_a_scale}),
        "sampler": {stage: _settings_json(settings) for stage, settings in sampler.items()},
        "files": {path: sha256(root / path) for path in files},
        "pieces": {
            "algorithm": ALGORITHM,
            "bytes": PIECE,
            "sums": {path: " ".join(sums_of(root / path)) for path in files if path.lower().endswith(SUFFIX)},
        },
    }
    scratch = root / ".model.json"
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    scratch.replace(root / "model.json")


def _settings_json(settings: StageSettings) -> dict[str, Any]:
    """A stage's settings, without a sampler that is the default, so that earlier versions can read them."""
    values = asdict(settings)
    return {name: value for name, value in values.items() if name != "sampler" or value != StageSettings.sampler}
