"""Model folders: opens them, checks them and loads their components.

A model folder is one directory. It holds ``model.json`` and one sub-folder per component (``COMPONENTS``) in the standard
transformers or diffusers form: ``config.json`` and one safetensors file. ``model.json`` has these fields::

    {"name": str, "license": str, "native_size": int,         # pixels, the side of the square that the model draws best
     "stage_a_scale": float,                                   # optional, overrides scale_factor in vqgan/config.json
     "sampler": {"prior":   {"steps": int, "guidance": float, "shift": float, "rescale": float, "sampler": str},
                 "decoder": {"steps": int, "guidance": float, "shift": float, "rescale": float, "sampler": str}},
                                                               # the last is optional: "ddpm"
     "files": {"prior/config.json": "<sha256>", ...},          # all files of all components and of ``EXTRAS``
     "pieces": {"algorithm": "xxh3_64", "bytes": int,          # checksums of the pieces of every safetensors file,
                "sums": {"prior/....safetensors": "<sum> <sum> ..."}}}                  # see ``cascade.weights.sums``

Loading compares every file with ``model.json``: networks by their pieces' checksums, other files by their sha256. The
environment variable ``CASCADE_CHECK_WEIGHTS=0`` turns this off. Folders of older versions have no ``pieces``, so only their
small files are compared.

A download of the two published repositories can be opened too: ``<folder>/stable-cascade-prior`` and
``<folder>/stable-cascade``, or the cache folders of huggingface_hub. Only safetensors files are opened; nothing is
unpickled. A problem with a file raises a ``WeightsError`` that names the file.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from cascade.networks.controlnet import KINDS
from cascade.networks.eight_bits import NETWORKS as EIGHT_BIT_NETWORKS
from cascade.networks.eight_bits import scale_of
from cascade.networks.layout import SCALE
from cascade.networks.precisions import (
    FORMS,
    bytes_of,
    converted,
    rounded,
    stored_precision,
    wanted_forms,
    without_scale,
)
from cascade.sizes import SMALLEST, WHOLE
from cascade.weights.blocks import DTYPES
from cascade.weights.components import COMPONENTS, CONTROLNETS, DISTILLED, NEEDED, PROCESSORS, TURBO, component_files
from cascade.weights.errors import WeightsError, readable, shortened
from cascade.weights.hashing import sha256
from cascade.weights.making import check_channels, load_processor, single_file_network, standard_network
from cascade.weights.names import PICKLES, SUFFIX
from cascade.weights.reading import (
    Sums,
    check_header,
    find_weights,
    no_weights,
    pickle_error,
    read_header,
    read_json,
    read_tensors,
)
from cascade.weights.settings import (
    PUBLISHED_LICENSE,
    PUBLISHED_SAMPLER,
    PUBLISHED_SIZE,
    PUBLISHED_STAGE_A_SCALE,
    StageSettings,
)
from cascade.weights.sums import ALGORITHM, sums_of

logger = logging.getLogger(__name__)

CHECK = "CASCADE_CHECK_WEIGHTS"


@dataclass(frozen=True)
class ModelFolder:
    """An opened model folder. Use :meth:`open`.

    Attributes:
        root: the directory.
        name, license: from ``model.json``.
        native_size: pixels, the side of the square that the model draws best.
        sampler: default settings by stage, ``"prior"`` and ``"decoder"``.
        parts: each component's path: its sub-folder, or the authors' single file.
        checksums: sha256 by path relative to ``root``; empty for the published repositories, which have none.
        sums: checksums of the pieces of safetensors files, by path relative to ``root``.
        checks: whether loading compares files with `checksums` and `sums`.
        stage_a_scale: factor by which Stage A multiplies latents before it decodes; None: `scale_factor` of its
            configuration.
    """

    root: Path
    name: str
    license: str
    native_size: int
    sampler: Mapping[str, StageSettings]
    parts: Mapping[str, Path]
    checksums: Mapping[str, str]
    sums: Mapping[str, Sums] = field(default_factory=dict)
    checks: bool = True
    stage_a_scale: float | None = None

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, lite: Collection[str] = (), check: bool | None = None
    ) -> "ModelFolder":
        """Open a model folder, or a folder with downloads of the two published repositories.

        Checks that every file listed in ``model.json`` exists, and that every safetensors file has the length that its
        header implies. Content is compared when a component is loaded, and by :meth:`verify`.

        Args:
            folder: the directory.
            lite: the stages (``"prior"``, ``"decoder"``) whose lite network is used, for the published repositories. If
                only one of the two networks was downloaded, that one is used.
            check: whether loading compares content with ``model.json``; None: yes, unless the environment variable
                ``CASCADE_CHECK_WEIGHTS`` is 0.

        Raises:
            WeightsError: the folder or one of its files is missing, damaged or a pickle.
        """
        root = Path(folder)
        with readable(root):
            return cls._open(root, lite, check)

    @classmethod
    def _open(cls, root: Path, lite: Collection[str], check: bool | None) -> "ModelFolder":
        if root.is_file():
            raise WeightsError(f"{root} is a file: scripts/save-weights --prior {root} makes a model folder of it.")
        if not root.is_dir():
            raise WeightsError(
                f"There is no model folder {root}. scripts/download-weights and scripts/save-weights make one."
            )
        opened = _open_own(root) if (root / "model.json").is_file() else _open_published(root, lite)
        for component, part in opened.parts.items():
            for file in [] if component in PROCESSORS else _weights_of(part):
                check_header(file)
        return replace(opened, checks=_checks() if check is None else check)

    def __contains__(self, component: str) -> bool:
        return component in self.parts

    def require(self, components: Collection[str] = tuple(NEEDED)) -> None:
        """Make sure that the folder has some components. Logs if their weights have no checksums.

        Raises:
            WeightsError: components are missing. The sentence names all of them.
        """
        missing = [component for component in components if component not in self.parts]
        if missing:
            raise WeightsError(self._without(missing))
        if self.checks and not self.sums:
            logger.info("The weights in %s have no checksums, so damage to them is not detected.", self.root)

    def _without(self, missing: Sequence[str]) -> str:
        """The error message for missing components."""
        sentence = f"{self.root} has no {' and no '.join(missing)}"
        if (self.root / "model.json").is_file():
            return f"{sentence}."
        repositories = list(dict.fromkeys(NEEDED[component] for component in missing if component in NEEDED))
        absent = [name for name in repositories if not _published_repository(self.root, name).is_dir()]
        if absent:
            return (
                f"{sentence}: the published repository {absent[0]} is not in it. scripts/download-weights fetches both."
            )
        return f"{sentence}. scripts/download-weights fetches all that is needed."

    def load_component(
        self,
        component: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: str = "full",
    ) -> Any:
        """Load one component.

        Args:
            component: one of ``COMPONENTS``.
            device, dtype: the device and dtype of the loaded weights. Ignored for the tokenizer and the feature extractor.
            precision: how weights are kept, whatever the files have: "full", in `dtype`; "int8" or "fp8", in 8 bits, see
                ``cascade.networks.precisions``.

        Returns:
            The network in evaluation mode, or the tokenizer or image processor.

        Raises:
            WeightsError: the folder has no such component, or a file of it is missing, does not fit its configuration, or
                differs from its checksum in ``model.json``.
        """
        if component not in COMPONENTS:
            raise ValueError(f"There is no component {component!r}; there are {', '.join(COMPONENTS)}.")
        if component not in self.parts:
            raise WeightsError(self._without([component]))
        with readable(self.root):
            return self._load(component, self.parts[component], device, dtype, precision)

    def _load(self, component: str, part: Path, device: str | torch.device, dtype: torch.dtype, precision: str) -> Any:
        self._compare_small_files(part)
        if component in PROCESSORS:
            return load_processor(component, part)
        weights = _weights_of(part)
        if not weights:
            raise no_weights(part)
        sums = self._sums_of(weights) if self.checks else None
        header = read_header(weights)
        forms = wanted_forms({name: shape for name, (shape, _) in header.items()}, component, precision)
        tensors = read_tensors(weights, device, dtype, sums, partial(rounded, forms=without_scale(forms, header)))
        check_eight_bits(weights[0], tensors)
        tensors = converted(tensors, forms, dtype)
        if part.is_file():
            network = single_file_network(component, part, tensors)
        else:
            network = standard_network(component, part / "config.json", weights[0], tensors)
        if component in CONTROLNETS:
            check_channels(weights[0], component, network.config.in_channels)
        return network.to(device)

    def _sums_of(self, files: Sequence[Path]) -> dict[Path, Sums]:
        by_path = {self.root / path: sums for path, sums in self.sums.items()}
        return {file: by_path[file] for file in files if file in by_path}

    def _compare_small_files(self, part: Path) -> None:
        """Compare the sha256 of a component's files other than weights with ``model.json``."""
        for path, expected in self.checksums.items() if self.checks else ():
            file = self.root / path
            if file.suffix.lower() != SUFFIX and file.is_relative_to(part) and sha256(file) != expected:
                raise WeightsError(
                    f"{file} is damaged: its checksum is not the one in {self.root / 'model.json'}. Fetch or copy the file "
                    "again."
                )

    def compare(self, name: str) -> None:
        """Compare the files of a component, or of one of ``EXTRAS``, with ``model.json``, as loading a component does.

        Raises:
            WeightsError: a file differs, or cannot be read.
        """
        with readable(self.root):
            self._compare_small_files(self.root / name)
        for path, sums in self.sums.items() if self.checks else ():
            file = self.root / path
            if not path.startswith(f"{name}/"):
                continue
            check_header(file)
            if sums_of(file, sums.least) != sums.listed:
                raise WeightsError(
                    f"{file} is damaged: its content differs from the checksums in {sums.where}. Fetch or copy the file "
                    "again."
                )

    def distilled(self) -> Path | None:
        """The adapter that makes few steps suffice, compared with ``model.json``; None: there is none.

        Raises:
            WeightsError: it is damaged.
        """
        file = self.root / DISTILLED
        if not file.is_file():
            return None
        self.compare(TURBO)
        return file

    def standard_files(self, components: Iterable[str]) -> dict[str, list[Path]]:
        """Of each component here that lies in the standard form, the safetensors files, whose tensors have our names."""
        folders = {name: self.parts[name] for name in components if name in self.parts and self.parts[name].is_dir()}
        return {name: find_weights(folder) for name, folder in folders.items()}

    def precision(self) -> str:
        """The precision in which the networks are stored: "full", "int8" or "fp8". Reads only the files' headers."""
        found = set()
        for paths in self.standard_files(EIGHT_BIT_NETWORKS).values():
            header = read_header(paths)
            found.add(stored_precision({name: DTYPES.get(kind, torch.float32) for name, (_, kind) in header.items()}))
        return next((one for one in ("fp8", "int8") if one in found), "full")

    def size(self, component: str, dtype: torch.dtype, *, precision: str = "full") -> int:
        """Bytes of a network's tensors as `load_component` loads them. Reads only the file's header.

        Raises:
            WeightsError: the folder has no such component, or no weights for it.
        """
        if component not in self.parts:
            raise WeightsError(self._without([component]))
        weights = _weights_of(self.parts[component])
        if not weights:
            raise no_weights(self.parts[component])
        total, header = 0, read_header(weights)
        forms = wanted_forms({name: shape for name, (shape, _) in header.items()}, component, precision)
        for name, (shape, kind) in header.items():
            if name.endswith(SCALE):
                continue
            if name in forms or scale_of(name) in header:
                total += bytes_of(shape, forms[name]) if name in forms else math.prod(shape) * dtype.itemsize
                continue
            bits = re.search(r"\d+", kind)  # F8_E4M3 has 8; BOOL has no number
            itemsize = dtype.itemsize if "F" in kind else int(bits.group() if bits else 8) // 8
            total += math.prod(shape) * itemsize
        return total

    def verify(self) -> None:
        """Compare the sha256 of every file with ``model.json``. Reads all files.

        Raises:
            WeightsError: a file differs, is missing or is not listed, or the folder has no ``model.json``.
        """
        if not self.checksums:
            raise WeightsError(f"{self.root / 'model.json'} does not exist, so there are no checksums to compare with.")
        for path in component_files(self.root):
            if path not in self.checksums:
                raise WeightsError(f"{self.root / path} is not listed in model.json.")
        for path, expected in self.checksums.items():
            file = self.root / path
            if not file.is_file():
                raise WeightsError(f"{file}, which model.json lists, is missing.")
            actual = sha256(file)
            if actual != expected:
                raise WeightsError(f"{file} has the checksum {actual}, but model.json says {expected}.")


def check_eight_bits(weights: Path, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that weights in 8 bits and their scales belong together.

    Raises:
        WeightsError: they do not.
    """
    for name, tensor in tensors.items():
        scale = tensors.get(scale_of(name))
        if scale is None:
            if tensor.dtype == torch.int8:
                raise WeightsError(f"{weights} has no tensor {scale_of(name)}, without which {name} cannot be used.")
            continue
        kinds = {form: one.layer.empty(1, 1, torch.device("meta")).scale.dtype for form, one in FORMS.items()}
        if kinds.get(tensor.dtype) != scale.dtype:
            given, *allowed = (
                " and ".join(str(one).removeprefix("torch.") for one in pair)
                for pair in ((tensor.dtype, scale.dtype), *kinds.items())
            )
            raise WeightsError(
                f"{weights}: {name} and its scale are stored as {given}; they must be {', or '.join(allowed)}."
            )
        if tensor.ndim != 2:
            raise WeightsError(
                f"{weights}: {name} has a scale, and the shape {tuple(tensor.shape)}; it must be a matrix."
            )
        wanted = tuple(FORMS[tensor.dtype].layer.empty(*tensor.shape, torch.device("meta")).scale.shape)
        if tuple(scale.shape) != wanted:
            raise WeightsError(f"{weights}: {scale_of(name)} has the shape {tuple(scale.shape)} instead of {wanted}.")
        bits = scale.view(torch.int32 if scale.itemsize == 4 else torch.int16)
        if FORMS[tensor.dtype].has_one_scale and (bits != bits[:1]).any():
            raise WeightsError(f"{weights}: {scale_of(name)} differs from row to row; all rows must have one scale.")


def _open_own(root: Path) -> ModelFolder:
    path = root / "model.json"
    content = read_json(path)
    try:
        opened = _described(root, content, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = shortened(error).rstrip(".")
        raise WeightsError(f"{path} lacks a field or has one of the wrong kind: {said}.") from error
    for listed in opened.checksums:
        if PurePosixPath(listed).is_absolute() or ".." in PurePosixPath(listed).parts:
            raise WeightsError(f"{path} lists {listed!r}, which is outside of the folder.")
        if listed.endswith(PICKLES):
            raise pickle_error(root / listed)
        if not (root / listed).is_file():
            raise WeightsError(f"{root / listed}, which model.json lists, is missing.")
    return opened


def _described(root: Path, content: Mapping[str, Any], path: Path) -> ModelFolder:
    """The folder that the content of a ``model.json`` describes."""
    checksums = dict(content["files"])
    sampler = {stage: _settings(content["sampler"][stage], stage, path) for stage in ("prior", "decoder")}
    for name in ("name", "license"):
        if not isinstance(content[name], str):
            raise WeightsError(f"{path}: {name} is {shortened(repr(content[name]))}; it must be a text.")
    size = content["native_size"]
    if type(size) is not int or not SMALLEST <= size <= WHOLE:
        raise WeightsError(
            f"{path}: native_size is {shortened(repr(size))}; it must be a whole number from {SMALLEST} to {WHOLE}."
        )
    scale = content.get("stage_a_scale")
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
        raise WeightsError(f"{path}: stage_a_scale is {shortened(repr(scale))}; it must be a number above 0.")
    return ModelFolder(
        root=root,
        name=content["name"],
        license=content["license"],
        native_size=size,
        sampler=sampler,
        parts={component: root / component for component in COMPONENTS if (root / component).is_dir()},
        checksums=checksums,
        sums=_read_sums(content.get("pieces"), path),
        stage_a_scale=None if scale is None else float(scale),
    )


def _settings(values: Mapping[str, Any], stage: str, path: Path) -> StageSettings:
    try:
        return StageSettings(**values)
    except ValueError as error:
        raise WeightsError(f"{path}: in the sampler of {stage}, {error}.") from error


def _read_sums(pieces: Any, path: Path) -> dict[str, Sums]:
    """The checksums in ``model.json`` under "pieces", by file. Empty for an unknown algorithm, of a newer version."""
    if pieces is None or pieces["algorithm"] != ALGORITHM:
        return {}
    return {file: Sums(sums.split(), path, int(pieces["bytes"])) for file, sums in pieces["sums"].items()}


def _checks() -> bool:
    """Whether the environment variable ``CASCADE_CHECK_WEIGHTS`` leaves checks on."""
    said = os.environ.get(CHECK) or "1"
    if said not in ("0", "1"):
        raise WeightsError(f"{CHECK} is {shortened(said)!r}; it must be 1, or 0 for no checks.")
    return said == "1"


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
        # A folder with only a config.json was not downloaded, so the other candidate is used.
        whole = [place for place in there if component in PROCESSORS or place.is_file() or find_weights(place)]
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
        stage_a_scale=PUBLISHED_STAGE_A_SCALE,
    )


def _published_repository(root: Path, name: str) -> Path:
    """The path of a downloaded repository: a folder of its name, or the snapshot of "main" in huggingface_hub's cache."""
    cache = root / f"models--stabilityai--{name}"
    main = cache / "refs" / "main"
    return cache / "snapshots" / main.read_text().strip() if main.is_file() else root / name


def _weights_of(part: Path) -> list[Path]:
    """The safetensors files of a component: its single file, or those in its folder; [] if there are none."""
    return [part] if part.is_file() else find_weights(part)
