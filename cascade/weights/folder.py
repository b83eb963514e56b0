"""Model folders: what they hold; how their parts are found, checked, read and written.

A model folder is one directory: ``model.json`` and one sub-folder a component (``COMPONENTS``) in the standard
transformers or diffusers form, ``config.json`` and one safetensors file. ``model.json`` says::

    {"name": str, "license": str, "native_size": int,         # pixels, the edge of the square that the model draws best
     "sampler": {"prior":   {"steps": int, "guidance": float, "shift": float, "rescale": float},
                 "decoder": {"steps": int, "guidance": float, "shift": float, "rescale": float}},
     "files": {"prior/config.json": "<sha256>", ...}}          # every file of every component, and of ``EXTRAS``

The two published repositories are read as a download leaves them, component by component:
``<folder>/stable-cascade-prior`` and ``<folder>/stable-cascade``, or the cache folders that huggingface_hub makes of
them. Only safetensors files are ever opened; nothing is unpickled. Whatever is wrong with a file is a
``WeightsError`` that names it.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.networks.controlnet import KINDS, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.weights import single_file

# How many channels each reads.
CONTROLNETS = {f"controlnet_{kind}": channels for kind, channels in KINDS.items()}
NETWORKS = {
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "prior": StableCascadeUNet,
    "decoder": StableCascadeUNet,
    "vqgan": StageA,
    "effnet": SemanticEncoder,
    "previewer": Previewer,
    **dict.fromkeys(CONTROLNETS, ControlNet),
}
PROCESSORS = {"tokenizer": CLIPTokenizer, "feature_extractor": CLIPImageProcessorPil}
PROCESSOR_FILES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "feature_extractor": (("preprocessor_config.json",),),
}
COMPONENTS = (*PROCESSORS, *NETWORKS)
# Folders that other modules read; here their files are only listed and checked.
EXTRAS = ("safety_checker",)

TRANSFORMERS_CONFIGS = {"text_encoder": CLIPTextConfig, "image_encoder": CLIPVisionConfig}
WEIGHT_FILES = (
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.safetensors",
    "model.bf16.safetensors",
    "model.safetensors",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Threads that read a file, each some of its tensors: from the page cache onto a GPU one copied 5.5 GB/s, four 8, eight 12 (H100,
# 16 cores).
READERS = 8
# Checkpoints written by old transformers hold this buffer; today's networks make it themselves.
IGNORED_KEYS = ("embeddings.position_ids",)


class WeightsError(Exception):
    """A file of a model folder is missing, damaged, of the wrong kind or not the one that was published."""


@dataclass(frozen=True)
class StageSettings:
    """How a stage is sampled unless the request says otherwise."""

    steps: int
    guidance: float
    shift: float
    rescale: float


# The authors' text-to-image settings for their own weights.
PUBLISHED_SAMPLER = {
    "prior": StageSettings(steps=20, guidance=4.0, shift=2.0, rescale=0.7),
    "decoder": StageSettings(steps=10, guidance=1.1, shift=1.0, rescale=0.7),
}
PUBLISHED_LICENSE = "Stability AI Non-Commercial Research Community License"
PUBLISHED_SIZE = 1024


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder. Use :meth:`open`.

    Attributes:
        root: the directory.
        name, license: what ``model.json`` says.
        native_size: pixels, the edge of the square that the model draws best.
        sampler: default settings by stage, ``"prior"`` and ``"decoder"``.
        parts: where each component lies: its sub-folder, or the authors' single file.
        checksums: sha256 by path relative to ``root``; empty for the published repositories, which come without.
    """

    root: Path
    name: str
    license: str
    native_size: int
    sampler: Mapping[str, StageSettings]
    parts: Mapping[str, Path]
    checksums: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, lite: Collection[str] = ()) -> "ModelFolder":
        """Open a model folder, or the folder that the two published repositories were downloaded to.

        Every file named in ``model.json`` must be there, and every safetensors file must be whole (its header and its
        length are looked at, its content is not: that is :meth:`verify`).

        Args:
            folder: the directory.
            lite: of the published repositories, the stages (``"prior"``, ``"decoder"``) whose lite network is taken.
                Where only one of the two networks was downloaded, that one is taken in any case.

        Raises:
            WeightsError: the folder or one of its files is missing, damaged or a pickle.
        """
        root = Path(folder)
        if not root.is_dir():
            raise WeightsError(f"There is no model folder {root}.")
        opened = _open_own(root) if (root / "model.json").is_file() else _open_published(root, lite)
        for part in opened.parts.values():
            weights = part if part.is_file() else _find_weights(part)
            if weights is not None:
                _check_header(weights)
        return opened

    def __contains__(self, component: str) -> bool:
        return component in self.parts

    def load_component(
        self, component: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Any:
        """Read one component.

        Args:
            component: one of ``COMPONENTS``.
            device, dtype: where the weights go and what they become on the way; of no matter to the tokenizer and the
                feature extractor.

        Returns:
            The network in evaluation mode, or the tokenizer or image processor.

        Raises:
            WeightsError: the folder has no such component, or a file of it is missing, damaged or does not fit its
                configuration.
        """
        if component not in COMPONENTS:
            raise ValueError(f"There is no component {component!r}; there are {', '.join(COMPONENTS)}.")
        if component not in self.parts:
            raise WeightsError(f"{self.root} has no component {component!r}.")
        part = self.parts[component]
        if component in PROCESSORS:
            return _load_processor(component, part)
        weights = part if part.is_file() else _find_weights(part)
        if weights is None:
            raise _no_weights(part)
        if part.is_file():
            network = _load_single_file(component, part, device, dtype)
        else:
            network = _load_network(component, part / "config.json", weights, device, dtype)
        if component in CONTROLNETS:
            check_channels(weights, component, network.config.in_channels)
        return network

    def size(self, component: str, dtype: torch.dtype) -> int:
        """The bytes of a network's tensors, those of floating point in `dtype`, by its file's header."""
        part = self.parts[component]
        weights = part if part.is_file() else _find_weights(part)
        if weights is None:
            raise _no_weights(part)
        total = 0
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (the file is no mapping)
                described = file.get_slice(key)
                kind = described.get_dtype()
                itemsize = dtype.itemsize if "F" in kind else int(kind.lstrip("BIOLU") or 8) // 8
                total += math.prod(described.get_shape()) * itemsize
        return total

    def verify(self) -> None:
        """Compare the sha256 of every file with ``model.json``. Reads the whole folder.

        Raises:
            WeightsError: a file differs, is missing or is not listed, or there is no ``model.json`` to compare with.
        """
        if not self.checksums:
            raise WeightsError(f"{self.root / 'model.json'} does not exist, so there are no checksums to compare with.")
        for path in _component_files(self.root):
            if path not in self.checksums:
                raise WeightsError(f"{self.root / path} is not listed in model.json.")
        for path, expected in self.checksums.items():
            file = self.root / path
            if not file.is_file():
                raise WeightsError(f"{file}, which model.json lists, is missing.")
            actual = _sha256(file)
            if actual != expected:
                raise WeightsError(f"{file} has the checksum {actual}, but model.json says {expected}.")


def save_model_folder(
    folder: str | os.PathLike[str],
    components: Mapping[str, Any],
    *,
    name: str,
    license: str,
    native_size: int,
    sampler: Mapping[str, StageSettings],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write components into a model folder, new or existing, and ``model.json`` with their checksums.

    The folder is made aside and put in place when it is complete, so a run that is killed leaves the old one whole.
    Whatever else an existing folder holds (other components, a README) is kept.

    Args:
        folder: the directory.
        components: networks, tokenizer, image processor by name, see ``COMPONENTS``.
        dtype: of the stored parameters. Buffers (the statistics of batch norms) keep their own.
    """
    unknown = set(components) - set(COMPONENTS)
    if unknown:
        raise ValueError(f"There is no component {sorted(unknown)[0]!r}; there are {', '.join(COMPONENTS)}.")
    with replacement(folder, without=components) as made:
        for component, item in components.items():
            save_component(made / component, item, dtype)
        write_model_json(made, name=name, license=license, native_size=native_size, sampler=sampler)


def check_channels(weights: Path, component: str, channels: int) -> None:
    """Make sure that a ControlNet reads as many channels as it is given.

    Raises:
        WeightsError: it does not; one of another kind has been put in its place.
    """
    if channels != CONTROLNETS[component]:
        raise WeightsError(f"{weights} is no {component}: it reads {channels} channels, not {CONTROLNETS[component]}.")


def empty_network(component: str, config_path: Path) -> nn.Module:
    """The network that a ``config.json`` describes, its parameters on the meta device: they have no content.

    Args:
        component: a name in ``NETWORKS``.
        config_path: the file.

    Raises:
        WeightsError: the file is missing or no JSON, or describes no such network.
    """
    config = _read_json(config_path)
    # Buffers that no file holds, such as CLIP's position ids, are made for real.
    with init_empty_weights(include_buffers=False):
        try:
            if component in TRANSFORMERS_CONFIGS:
                return NETWORKS[component](TRANSFORMERS_CONFIGS[component].from_dict(config))
            return NETWORKS[component].from_config(config)
        except Exception as error:  # what networks make of wrong settings
            raise WeightsError(f"{config_path} describes no {component}: {error}") from error


@contextlib.contextmanager
def replacement(
    folder: str | os.PathLike[str],
    *,
    without: Collection[str] = (),
    copy: Callable[[str, str], object] = shutil.copy2,
) -> Iterator[Path]:
    """A new folder, beside ``folder``, that takes its place when the block ends, and vanishes if the block raises.

    Args:
        folder: the directory; it need not exist.
        without: of what it holds, the names that are left out. All else is in the new folder from the start.
        copy: copies a file.
    """
    target = Path(folder).resolve()  # a link to a folder elsewhere stays one
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


def save_component(folder: Path, item: Any, dtype: torch.dtype) -> None:
    """Write a network, its parameters in ``dtype``, a tokenizer or an image processor into a folder that is made."""
    folder.mkdir(parents=True)
    if not isinstance(item, nn.Module):
        item.save_pretrained(folder)
        return
    parameters = {name for name, _ in item.named_parameters()}
    tensors = {
        key: tensor.detach().to("cpu", dtype if key in parameters else tensor.dtype).contiguous()
        for key, tensor in item.state_dict().items()
    }
    transformers_made = isinstance(item, CLIPTextModelWithProjection | CLIPVisionModelWithProjection)
    if transformers_made:
        item.config.save_pretrained(folder)
    else:
        item.save_config(folder)
    file = "model.safetensors" if transformers_made else "diffusion_pytorch_model.safetensors"
    save_file(tensors, folder / file, metadata={"format": "pt"})
    _forget_origin(folder / "config.json")
    shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody but the owner read it


def _forget_origin(config_path: Path) -> None:
    """Take out of a ``config.json`` where on its maker's disk the network was read from, which diffusers notes there."""
    config = _read_json(config_path)
    if config.pop("_name_or_path", None) is not None:
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model_json(
    folder: str | os.PathLike[str],
    *,
    name: str,
    license: str,
    native_size: int,
    sampler: Mapping[str, StageSettings],
) -> None:
    """Write ``model.json`` for the components that lie in ``folder``, with the sha256 of each of their files."""
    root = Path(folder)
    content = {
        "name": name,
        "license": license,
        "native_size": native_size,
        "sampler": {stage: asdict(settings) for stage, settings in sampler.items()},
        "files": {path: _sha256(root / path) for path in _component_files(root)},
    }
    scratch = root / ".model.json"
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    scratch.replace(root / "model.json")


def _open_own(root: Path) -> ModelFolder:
    path = root / "model.json"
    content = _read_json(path)
    try:
        checksums = dict(content["files"])
        opened = ModelFolder(
            root=root,
            name=content["name"],
            license=content["license"],
            native_size=int(content["native_size"]),
            sampler={stage: StageSettings(**content["sampler"][stage]) for stage in ("prior", "decoder")},
            parts={component: root / component for component in COMPONENTS if (root / component).is_dir()},
            checksums=checksums,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} lacks a field or has one of the wrong kind: {error}.") from error
    for listed in checksums:
        if PurePosixPath(listed).is_absolute() or ".." in PurePosixPath(listed).parts:
            raise WeightsError(f"{path} lists {listed!r}, which lies outside of the folder.")
        if listed.endswith(PICKLES):
            raise _pickle(root / listed)
        if not (root / listed).is_file():
            raise WeightsError(f"{root / listed}, which model.json lists, is missing.")
    return opened


def _open_published(root: Path, lite: Collection[str]) -> ModelFolder:
    prior_repository = _published_repository(root, "stable-cascade-prior")
    decoder_repository = _published_repository(root, "stable-cascade")
    repositories = [repository for repository in (prior_repository, decoder_repository) if repository.is_dir()]
    if not repositories:
        raise WeightsError(f"{root / 'model.json'} does not exist, nor {prior_repository}, nor {decoder_repository}.")
    places = {
        "tokenizer": [repository / "tokenizer" for repository in repositories],
        "text_encoder": [repository / "text_encoder" for repository in repositories],
        "image_encoder": [prior_repository / "image_encoder"],
        "feature_extractor": [prior_repository / "feature_extractor"],
        "prior": [prior_repository / "prior", prior_repository / "prior_lite"],
        "decoder": [decoder_repository / "decoder", decoder_repository / "decoder_lite"],
        "vqgan": [decoder_repository / "vqgan"],
        "effnet": [decoder_repository / "effnet_encoder.safetensors"],
        "previewer": [decoder_repository / "previewer.safetensors"],
        **{f"controlnet_{kind}": [decoder_repository / "controlnet" / f"{kind}.safetensors"] for kind in KINDS},
    }
    for stage in lite:
        if stage not in ("prior", "decoder"):
            raise ValueError(f"lite names {stage!r}; the stages with a lite network are 'prior' and 'decoder'.")
        places[stage].reverse()
    parts = {}
    for component, candidates in places.items():
        there = [place for place in candidates if place.exists()]
        # A folder that has only its config.json was left out of the download: the other one is meant.
        whole = [place for place in there if component in PROCESSORS or place.is_file() or _find_weights(place)]
        if there:
            parts[component] = (whole or there)[0]
    return ModelFolder(
        root=root,
        name="Stable Cascade",
        license=PUBLISHED_LICENSE,
        native_size=PUBLISHED_SIZE,
        sampler=PUBLISHED_SAMPLER,
        parts=parts,
        checksums={},
    )


def _published_repository(root: Path, name: str) -> Path:
    """Where a repository lies: a folder of its name, or the snapshot that huggingface_hub's cache calls main."""
    cache = root / f"models--stabilityai--{name}"
    main = cache / "refs" / "main"
    return cache / "snapshots" / main.read_text().strip() if main.is_file() else root / name


def _find_weights(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _no_weights(folder: Path) -> WeightsError:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return _pickle(pickles[0])
    return WeightsError(f"{folder} has no weights: it should hold one of {', '.join(WEIGHT_FILES)}.")


def _pickle(path: Path) -> WeightsError:
    return WeightsError(f"{path} is a pickle, which can run code when it is read; only safetensors files are opened.")


def _check_header(path: Path) -> None:
    """safetensors compares the header's offsets with the file's length, so this finds a truncated file at once."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_tensors(path: Path, device: str | torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def read(share: int) -> dict[str, torch.Tensor]:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in list(file.keys())[share::READERS]}

    try:
        with ThreadPoolExecutor(READERS) as threads:
            shares = threads.map(read, range(READERS))
            tensors = {key: tensor for share in shares for key, tensor in share.items()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or no safetensors file: {error}") from error
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing.") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error


def _load_processor(component: str, folder: Path) -> Any:
    # Without its files the tokenizer would come back empty, and take every word for an unknown one.
    if not any(all((folder / name).is_file() for name in names) for names in PROCESSOR_FILES[component]):
        wanted = ", or ".join(" and ".join(names) for names in PROCESSOR_FILES[component])
        raise WeightsError(f"{folder} lacks {wanted}.")
    try:
        return PROCESSORS[component].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise WeightsError(f"{folder} holds no readable {component}: {error}") from error


def _load_network(
    component: str, config_path: Path, weights: Path, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    network = empty_network(component, config_path)
    tensors = _read_tensors(weights, device, dtype)
    try:
        result = network.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{weights} does not fit {config_path}: {error}") from error
    unexpected = [key for key in result.unexpected_keys if not key.endswith(IGNORED_KEYS)]
    if result.missing_keys or unexpected:
        raise WeightsError(
            f"{weights} does not fit {config_path}: it lacks {result.missing_keys[:3] or 'nothing'} and has "
            f"{unexpected[:3] or 'nothing'} too many."
        )
    return network.to(device).eval()


def _load_single_file(component: str, path: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """A network of the published size from the authors' own file, which has no configuration."""
    tensors = single_file.convert(_read_tensors(path, device, dtype))
    network, config = NETWORKS[component], None
    try:
        if network is ControlNet:  # of which several kinds were published
            config = single_file.controlnet_config({key: tensor.shape for key, tensor in tensors.items()})
        return single_file.build(tensors, network, config).to(device)
    except ValueError as error:
        raise WeightsError(f"{path} is not the published {component}: {error}") from error


def _component_files(root: Path) -> list[str]:
    """The files of all components and extras, as paths relative to ``root``, sorted."""
    files = (file for component in (*COMPONENTS, *EXTRAS) for file in (root / component).rglob("*") if file.is_file())
    return sorted(file.relative_to(root).as_posix() for file in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
