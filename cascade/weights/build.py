"""Makes a model folder of a download, and of files and folders of one's own. All is checked before anything is written.

What was published in the standard form is kept as it is, bit for bit: files are linked where the disk allows it, so a
folder beside its download takes no room of its own. Single files are converted, and files of one's own copied: who goes
on training into the same file must not change the model. The folder appears when it is complete; what an older one held
besides is kept.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cascade.networks.controlnet import ControlNet
from cascade.safety import FOLDER as SAFETY_CHECKER
from cascade.safety import SafetyChecker
from cascade.weights.fitting import misfit
from cascade.weights.folder import (
    COMPONENTS,
    CONTROLNETS,
    EXTRAS,
    NEEDED,
    NETWORKS,
    PUBLISHED_LICENSE,
    PUBLISHED_SAMPLER,
    PUBLISHED_SIZE,
    PUBLISHED_STAGE_A_SCALE,
    ModelFolder,
    WeightsError,
    check_channels,
    empty_network,
)
from cascade.weights.hashing import sha256
from cascade.weights.manifest import Manifest
from cascade.weights.published import ALWAYS, PARTS, Part
from cascade.weights.reading import read_header, read_json
from cascade.weights.single_file import controlnet_config
from cascade.weights.sources import Source, find
from cascade.weights.writing import replacement, save_component, write_model_json

logger = logging.getLogger(__name__)

STAGES = ("prior", "decoder")
# What a file or folder may hold beside what was asked for, and what is fine-tuned with it. Anything else in it is taken
# only where the model has none: ComfyUI's files hold encoders as published, but in half the precision.
TRAINED = ("tokenizer", "text_encoder", "prior", "decoder", "vqgan")
# Width and scale in the published vqgan/config.json, of which the scale is not the one to use.
PUBLISHED_STAGE_A = (384, 0.3764)
# Numbers that two components must agree on: a component, a setting of it, and the same of the other.
SHARED = (
    ("prior", "clip_text_in_channels", "text_encoder", "hidden_size"),
    ("prior", "clip_text_pooled_in_channels", "text_encoder", "projection_dim"),
    ("prior", "clip_image_in_channels", "image_encoder", "projection_dim"),
    ("ip_adapter", "feature_dim", "image_encoder", "hidden_size"),
    ("decoder", "clip_text_pooled_in_channels", "text_encoder", "projection_dim"),
    ("decoder", "effnet_in_channels", "prior", "out_channels"),
    ("decoder", "out_channels", "vqgan", "latent_channels"),
)


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


def choose(asked: Mapping[str, Path], folders: list[Path], there: set[str]) -> dict[str, Source]:
    """The components that files and folders of one's own give.

    Args:
        asked: files and folders by what is wanted of them, "controlnet-1", "controlnet-2" ... for ControlNets.
        folders: of which all is wanted.
        there: the components that the model has anyway.

    Returns:
        Components by name: those asked for; besides, what else these hold of `TRAINED`, and of what is not there.

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


def save_own(
    asked: Mapping[str, Path], folders: list[Path], target: Path, *, base: Path, download: Path, name: str | None = None
) -> None:
    """Make a model folder, or change the one that is there, of files and folders of one's own.

    What they do not hold is the model's that is there, else that of another, else a download's.

    Args:
        asked, folders: see `choose`.
        target: the model folder.
        base: another, which need not exist.
        download: the folder of a download, which need not exist.
        name: of the model; None: that of the first file or folder which gives a stage.

    Raises:
        DownloadError: the download is damaged.
        WeightsError: see `save_model` and `sources.find`.
        OSError, SafetensorError: the folder cannot be written.
    """
    check_target(target)
    based = base.resolve() != target.resolve() and (base / "model.json").is_file()
    there = components_in(target)
    copied = (components_in(base) if based else set()) - there
    listed = Manifest.read(download) if Manifest.file(download).is_file() else Manifest([], {})
    parts = [PARTS[part] for part in listed.parts if PARTS[part].component not in there | copied]
    sources = choose(asked, folders, there | copied | {part.component for part in parts})
    copied -= set(sources)
    parts = [part for part in parts if part.component not in sources]
    missing = set(NEEDED) - there - copied - {part.component for part in parts} - set(sources)
    if missing:
        raise WeightsError(
            f"{target} would have no {' and no '.join(sorted(missing))}: run scripts/download-weights first, or name a "
            "model folder that has them with --base."
        )
    known = {
        component: [file for folder in (target, base) if (file := folder / component / "config.json").is_file()]
        for component in sources
    }
    configs: dict[str, Any] = {}
    for component, source in sources.items():
        logger.info("Checking %s in %s.", component, source.origin)
        network = source.check(known[component])
        if network is not None:
            configs[component] = network.config
    for part in parts:
        check_files(download, part, listed.files)
        check_content(download, part)
    others = {part.component: download / part.paths[0] for part in parts}
    others |= {component: base / component / "config.json" for component in copied}
    others |= {component: target / component / "config.json" for component in there}
    check_agreement(configs, others, target)
    about = describe([], target if there else base if based else target)
    stage = next((sources[one].origin for one in STAGES if one in sources), None)
    if name or stage:
        about["name"] = name or stage.stem
    if "vqgan" in sources:
        about["stage_a_scale"] = stage_a_scale(
            sources["vqgan"], configs["vqgan"], known["vqgan"], about["stage_a_scale"]
        )
    with replacement(target, without=set(sources), copy=link) as folder:
        for component in copied:
            shutil.copytree(base / component, folder / component, copy_function=link)
        for part in parts:
            place(download, part, folder / part.component)
        for component, source in sources.items():
            logger.info("Writing %s.", component)
            source.write(folder / component, known[component])
        write_model_json(folder, **about)
        ModelFolder.open(folder)


def stage_a_scale(source: Source, config: Any, known: list[Path], before: float | None) -> float | None:
    """What ``model.json`` says of a Stage A of one's own; None: its configuration is right.

    Args:
        source, config: the new Stage A, and its configuration.
        known: those of the one that is there, and of the one in the base.
        before: what ``model.json`` said of that.
    """
    if source.config is None:  # else it is the published, or of the size of the one that is there
        same = [file for file in known if read_json(file).get("scale_factor") == config.scale_factor]
        return before if same else None
    # Fine-tuned ones come with the configuration of the published one.
    width, scale = PUBLISHED_STAGE_A
    return PUBLISHED_STAGE_A_SCALE if (config.embed_dim, config.scale_factor) == (width, scale) else None


def verify(target: Path) -> None:
    """Compare every file of a model folder with its sha256; then list the sums of pieces, if an older version did not.

    Raises:
        WeightsError: a file differs, is missing or is not listed.
    """
    opened = ModelFolder.open(target)
    opened.verify()
    if not opened.sums:
        write_model_json(target, **describe([], target))


def check_agreement(configs: Mapping[str, Any], others: Mapping[str, Path], target: Path) -> None:
    """Make sure that components fit each other.

    Args:
        configs: of the networks that are new.
        others: ``config.json`` of those that are there.
        target: the model folder, for the sentence.

    Raises:
        WeightsError: two differ in a number that they share.
    """
    for first, setting, second, other in SHARED:
        values = []
        for component, name in ((first, setting), (second, other)):
            if component in configs:
                values.append(getattr(configs[component], name))
            elif component in others:
                values.append(getattr(empty_network(component, others[component]).config, name))
        if {first, second} & configs.keys() and len(values) == 2 and values[0] != values[1]:
            raise WeightsError(
                f"In {target}, {first} and {second} would not fit each other: {setting} of {first} is {values[0]}, but "
                f"{other} of {second} is {values[1]}."
            )


def check_target(target: Path) -> None:
    """Refuse a folder that holds something other than a model."""
    if target.is_dir() and any(target.iterdir()) and not (target / "model.json").is_file():
        raise WeightsError(f"{target} holds something other than a model: name another folder with --output.")


def describe(parts: list[str], target: Path) -> dict[str, Any]:
    """What ``model.json`` will say besides the files: as published, or as it was if no stage is replaced."""
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


def check_files(download: Path, part: Part, checksums: dict[str, str]) -> None:
    """Compare a part's files with what the Hub said of them."""
    compare(download, {path: checksums[path] for path in part.paths})


def compare(download: Path, checksums: Mapping[str, str]) -> None:
    """Compare files of a download with their sha256, by path in its folder.

    Raises:
        WeightsError: one is missing or damaged.
    """
    for path, expected in checksums.items():
        file = download / path
        if not file.is_file():
            raise WeightsError(f"{file} is missing: run scripts/download-weights again.")
        if sha256(file) != expected:
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
        config = controlnet_config({name: shape for name, (shape, _) in read_header([file]).items()})
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
    stored = read_header([weights])
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = misfit(expected, {name: shape for name, (shape, _) in stored.items()})
    if wrong is not None:
        raise WeightsError(f"{weights}{wrong}.")
    buffers = {name for name, _ in network.named_buffers()}
    for name, (_, kind) in stored.items():
        # The statistics of a normalisation may be kept in float32, and counters are integers.
        allowed = (dtype, "F32", "I64") if name in buffers else (dtype,)
        if name in expected and kind not in allowed:
            raise WeightsError(f"{weights}: {name} has the dtype {kind} instead of {dtype}.")


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
