"""Makes a model folder from a download and from the user's own files and folders. Checks everything before it writes.

Published files in the standard form are kept bit for bit. They are hard links where the disk allows it, so a model folder
next to its download takes no extra space. Single-file checkpoints are converted. The user's own files are copied, so that
further training into the same file does not change the model. The new folder replaces the old one when it is complete;
other files of the old one are kept.
"""

import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cascade.networks.eight_bits import NETWORKS as EIGHT_BIT_NETWORKS
from cascade.networks.precisions import converted, rounded, wanted_forms, without_scale
from cascade.weights.agreement import check_agreement, check_stored_processors
from cascade.weights.components import COMPONENTS, DISTILLED, EXTRAS, NEEDED, NETWORKS, TURBO
from cascade.weights.downloaded import check_part, place
from cascade.weights.errors import WeightsError
from cascade.weights.folder import ModelFolder
from cascade.weights.manifest import Manifest
from cascade.weights.names import SUFFIX
from cascade.weights.published import ALWAYS, PARTS, Part
from cascade.weights.reading import find_weights, read_json, read_tensors
from cascade.weights.settings import (
    PUBLISHED_LICENSE,
    PUBLISHED_SAMPLER,
    PUBLISHED_SIZE,
    PUBLISHED_STAGE_A,
    PUBLISHED_STAGE_A_SCALE,
)
from cascade.weights.sources import Source, find
from cascade.weights.writing import link, replacement, write_model_json

logger = logging.getLogger(__name__)

STAGES = ("prior", "decoder")
# Components that are often fine-tuned. A file that holds one replaces the model's, even if another was asked for. Its other
# components are used only where the model has none: ComfyUI's files hold the published encoders in half the precision.
TRAINED = ("tokenizer", "text_encoder", "prior", "decoder", "vqgan")


def save_model(download: Path, target: Path, *, precision: str = "full") -> None:
    """Make a model folder, or extend an existing one, with the files that ``download.json`` lists.

    Checks all files before it writes.

    Args:
        download: the folder of the download.
        target: the model folder.
        precision: how weights are stored: "full", as they are; "int8" or "fp8", see `store_in_eight_bits`.

    Raises:
        DownloadError: there is no complete download.
        WeightsError: a file is missing, differs from the Hub's, or lacks tensors; or `target` is not a model folder.
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
        check_part(download, part, manifest.files)
    with replacement(target, without=made, copy=link) as folder:
        for part in parts:
            place(download, part, folder / part.component)
        leave_out_distilled(folder, target, made)
        _complete(folder, about, precision=precision)


def save_own(
    asked: Mapping[str, Path],
    folders: list[Path],
    target: Path,
    *,
    base: Path,
    download: Path,
    name: str | None = None,
    precision: str = "full",
) -> None:
    """Make a model folder, or change an existing one, with the user's own files and folders.

    Missing components are kept from `target`, else copied from `base`, else taken from `download`.

    Args:
        asked, folders: see `choose`.
        target: the model folder.
        base: another model folder. It need not exist.
        download: the folder of a download. It need not exist.
        name: the model's new name; None: the name of the first file or folder that holds Stage C or B.
        precision: how weights are stored: "full", as they are; "int8" or "fp8", see `store_in_eight_bits`.

    Raises:
        DownloadError: the download is damaged.
        WeightsError: see `save_model` and `sources.find`.
        OSError, SafetensorError: the folder cannot be written.
    """
    check_target(target)
    origins = _Origins.choose(asked, folders, target, base, download)
    configs = origins.check()
    about = origins.describe(configs, name)
    with replacement(target, without=set(origins.own), copy=link) as folder:
        origins.write(folder)
        check_stored_processors(folder, target)
        _complete(folder, about, precision=precision)


@dataclass(frozen=True)
class _Origins:
    """Where each component of a model folder comes from.

    Attributes:
        target: the model folder.
        base: another model folder.
        download: the folder of a download.
        based: whether there is such another folder.
        own: components from the user's own files and folders.
        kept: components that the model folder has already; those in `own` replace them.
        copied: components from the base.
        parts: those from the download.
        checksums: sha256 of the download's files, by path.
    """

    target: Path
    base: Path
    download: Path
    based: bool
    own: Mapping[str, Source]
    kept: set[str]
    copied: set[str]
    parts: list[Part]
    checksums: Mapping[str, str]

    @classmethod
    def choose(
        cls, asked: Mapping[str, Path], folders: list[Path], target: Path, base: Path, download: Path
    ) -> "_Origins":
        """See `save_own`. Raises a WeightsError if a needed component comes from nowhere."""
        based = base.resolve() != target.resolve() and (base / "model.json").is_file()
        kept = components_in(target)
        copied = (components_in(base) if based else set()) - kept
        listed = Manifest.read(download) if Manifest.file(download).is_file() else Manifest([], {})
        parts = [PARTS[part] for part in listed.parts if PARTS[part].component not in kept | copied]
        own = choose(asked, folders, kept | copied | {part.component for part in parts})
        copied -= set(own)
        parts = [part for part in parts if part.component not in own]
        missing = set(NEEDED) - kept - copied - {part.component for part in parts} - set(own)
        if missing:
            raise WeightsError(
                f"{target} would have no {' and no '.join(sorted(missing))}: run scripts/download-weights first, or name a "
                "model folder that has them with --base."
            )
        return cls(target, base, download, based, own, kept, copied, parts, listed.files)

    def known(self, component: str) -> list[Path]:
        """The ``config.json`` files of a component in the model folder and in its base."""
        files = (folder / component / "config.json" for folder in (self.target, self.base))
        return [file for file in files if file.is_file()]

    def check(self) -> dict[str, Any]:
        """Check all components that come from elsewhere. Returns the configurations of the user's own.

        Raises:
            WeightsError: a file does not fit, or two components do not fit each other.
        """
        configs: dict[str, Any] = {}
        for component, source in self.own.items():
            logger.info("Checking %s in %s.", component, source.origin)
            network = source.check(self.known(component))
            if network is not None:
                configs[component] = network.config
        for part in self.parts:
            check_part(self.download, part, self.checksums)
        others = {part.component: self.download / part.paths[0] for part in self.parts}
        others |= {component: self.base / component / "config.json" for component in self.copied}
        others |= {component: self.target / component / "config.json" for component in self.kept}
        check_agreement(configs, others, self.target)
        return configs

    def describe(self, configs: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        """The fields of ``model.json`` besides checksums. `configs`: see `check`; `name`: see `save_own`."""
        about = describe([], self.target if self.kept or not self.based else self.base)
        stage = next((self.own[one].origin for one in STAGES if one in self.own), None)
        if name or stage:
            about["name"] = name or stage.stem
        if "vqgan" in self.own:
            scale = about["stage_a_scale"]
            about["stage_a_scale"] = stage_a_scale(self.own["vqgan"], configs["vqgan"], self.known("vqgan"), scale)
        return about

    def write(self, folder: Path) -> None:
        """Write the components that come from elsewhere into a copy of the model folder."""
        for component in self.copied:
            shutil.copytree(self.base / component, folder / component, copy_function=link)
        for part in self.parts:
            place(self.download, part, folder / part.component)
        for component, source in self.own.items():
            logger.info("Writing %s.", component)
            source.write(folder / component, self.known(component))
        if TURBO in self.copied:
            leave_out_distilled(folder, self.base, set(STAGES) - self.copied)
        else:
            leave_out_distilled(folder, self.target, set(self.own))


def choose(asked: Mapping[str, Path], folders: list[Path], there: set[str]) -> dict[str, Source]:
    """Choose the components to take from the user's own files and folders.

    Args:
        asked: files and folders by component. Keys for ControlNets are "controlnet-1", "controlnet-2" ...
        folders: folders from which all components are wanted.
        there: the components that the model has already.

    Returns:
        Components by name: those asked for, and others in the same files that are in `TRAINED` or not in `there`.

    Raises:
        WeightsError: see `sources.find`.
    """
    chosen: dict[str, Source] = {}
    others: dict[str, Source] = {}
    for key, path in asked.items():
        wanted = key.partition("-")[0]
        found = find(path, wanted)
        logger.info("%s holds %s.", path, ", ".join(found))
        for component, source in found.items():
            is_wanted = component == wanted or component.startswith(f"{wanted}_")
            (chosen if is_wanted else others).setdefault(component, source)
    for folder in folders:
        found = find(folder)
        logger.info("%s holds %s.", folder, ", ".join(found))
        others = {**found, **others}
    more = {component: source for component, source in others.items() if component in TRAINED or component not in there}
    return {**more, **chosen}


def components_in(folder: Path) -> set[str]:
    """The components and extras of a model folder; none if it does not exist."""
    return {name for name in (*COMPONENTS, *EXTRAS) if (folder / name).is_dir()}


def leave_out_distilled(folder: Path, origin: Path, others: Collection[str]) -> None:
    """Remove the adapter for the speed "turbo" from a new model folder if Stages C and B are not those that it was made for.

    Args:
        folder: the new model folder.
        origin: the model folder that the adapter came from.
        others: components of `folder` that did not come from there. They may still be the same.
    """
    if not (folder / DISTILLED).is_file():
        return
    for stage in STAGES:
        if stage in others and not same_files(folder / stage, origin / stage):
            logger.info(
                "Leaving out the adapter for the speed turbo, which was made for another %s; docs/training.md says how to make "
                "one.",
                stage,
            )
            shutil.rmtree(folder / TURBO)
            return


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders have the same safetensors files."""
    first, second = ({file.name: file for file in folder.glob(f"*{SUFFIX}")} for folder in (one, other))
    return first.keys() == second.keys() and all(cmp(first[name], second[name], shallow=False) for name in first)


def _complete(folder: Path, about: Mapping[str, Any], *, precision: str) -> None:
    """Store weights in 8 bits, if that is wanted, and write ``model.json``."""
    if precision != "full":
        store_in_eight_bits(folder, precision)
    write_model_json(folder, **about)
    ModelFolder.open(folder)


def store_in_eight_bits(folder: Path, precision: str) -> None:
    """Store the networks of a model folder in 8 bits, those that can be, see ``cascade.networks.precisions``.

    Such a network becomes one file. Its old files are removed, not changed: they may be hard links.

    Raises:
        WeightsError: a weight is infinite or NaN, which 8 bits do not have.
    """
    for component in EIGHT_BIT_NETWORKS:
        if not (folder / component).is_dir():
            continue
        files = find_weights(folder / component)
        logger.info("Storing %s in 8 bits.", component)
        tensors = read_tensors(files)
        forms = wanted_forms({name: tensor.shape for name, tensor in tensors.items()}, component, precision)
        new = without_scale(forms, tensors)
        for name, tensor in tensors.items():
            if name in new and tensor.is_floating_point() and not tensor.isfinite().all():
                raise WeightsError(f"{component} cannot be stored in 8 bits: {name} holds infinite or NaN values.")
        made = folder / component / f"{NETWORKS[component].weights_name}{SUFFIX}"
        scratch = made.with_name(f".{made.name}")
        save_file(converted(rounded(tensors, new), forms, torch.bfloat16), scratch, metadata={"format": "pt"})
        shutil.copymode(files[0], scratch)
        for old in (*files, *(folder / component).glob(f"*{SUFFIX}.index*.json")):
            old.unlink()
        scratch.replace(made)


def verify(target: Path) -> None:
    """Compare every file of a model folder with its sha256. Then add the pieces' checksums, if ``model.json`` lacks them.

    Raises:
        WeightsError: a file differs, is missing or is not listed.
    """
    opened = ModelFolder.open(target)
    opened.verify()
    if not opened.sums:
        write_model_json(target, **describe([], target))


def describe(parts: list[str], target: Path) -> dict[str, Any]:
    """The fields of ``model.json`` besides checksums: the published ones, or the old ones if Stages C and B are kept."""
    check_target(target)
    if not any(PARTS[name].component in STAGES for name in parts) and target.is_dir():
        old = ModelFolder.open(target)
        about = ("name", "license", "native_size", "sampler", "stage_a_scale")
        return {field: getattr(old, field) for field in about}
    lite = [PARTS[name].component for name in parts if name.endswith("_lite")]
    return {
        "name": f"Stable Cascade (lite {' and '.join(lite)})" if lite else "Stable Cascade",
        "license": PUBLISHED_LICENSE,
        "native_size": PUBLISHED_SIZE,
        "sampler": PUBLISHED_SAMPLER,
        "stage_a_scale": PUBLISHED_STAGE_A_SCALE,
    }


def check_target(target: Path) -> None:
    """Raise a WeightsError if `target` has files but is not a model folder."""
    if target.is_dir() and any(target.iterdir()) and not (target / "model.json").is_file():
        raise WeightsError(f"{target} is not a model folder, and not empty: name another folder with --output.")


def stage_a_scale(source: Source, config: Any, known: list[Path], before: float | None) -> float | None:
    """The ``stage_a_scale`` of ``model.json`` for the user's own Stage A; None: its ``config.json`` has the right scale.

    Args:
        source, config: the new Stage A, and its configuration.
        known: the ``config.json`` of the target's and of the base's Stage A.
        before: the ``stage_a_scale`` of the old ``model.json``.
    """
    if source.config is None:  # so `config` is the published one, or one of `known`
        same = [file for file in known if read_json(file).get("scale_factor") == config.scale_factor]
        return before if same else None
    # Fine-tuned networks have the published configuration, with the scale that is not the one to use.
    published = all(config[name] == value for name, value in PUBLISHED_STAGE_A.items())
    return PUBLISHED_STAGE_A_SCALE if published else None
