"""Makes the shipped miniature out of what a training has finished.

A component is shipped when all stages of the configuration that train it are finished. The others stay what they are in the
shipped folder, unless they were trained with a component that is new: then they are left out, or, if no picture can be made
without them, nothing is shipped.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.weights import CONTROLNETS, NETWORKS, TURBO, ModelFolder
from cascade.weights.writing import replacement, write_model_json
from miniature.icons import STYLES, load_objects
from miniature.vocabulary import vocabulary
from training.assemble import assemble
from training.distilled import ADAPTERS
from training.errors import TrainingError, writing
from training.recipe import costs
from training.record import read_times
from training.run import FINISHED
from training.stages import ORDER, STAGES, trained_by

COSTS, VOCABULARY = "training.json", "vocabulary.json"
LORAS = "loras"
EXTRAS = ("ip_adapter", TURBO, LORAS)
"""What the limit of 40 MB does not count."""
ADAPTED = ("tokenizer", "text_encoder", "prior")
"""A LoRA was trained for these."""
OWN = ("feature_extractor", "tokenizer", *NETWORKS, TURBO, LORAS, "model.json", COSTS, VOCABULARY)
"""What a shipment makes anew in a folder."""
LIMITS = {"all": 44_000_000, "without the IP-Adapter, turbo and LoRAs": 40_000_000, "of LoRAs": 1_000_000}
"""Highest sizes in bytes."""


@dataclass(frozen=True)
class Shipment:
    """What a shipped folder is made of.

    Attributes:
        new: components of the training, with ``turbo_prior`` and ``turbo_decoder``.
        kept: components and extras of the shipped folder that stay.
        left: those that go, because they were trained with other components.
    """

    new: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        parts = (("New", self.new), ("Kept", self.kept), ("Left out, trained with other components", self.left))
        return "\n".join(f"{label}: {', '.join(names)}." for label, names in parts if names)


def finished_components(config: Mapping[str, Any], trained: Path) -> list[str]:
    """The components that a training has finished, in the order of the stages.

    Args:
        config: the configuration's tables; a component is finished when all stages that have a table and train it are.
        trained: the training's folder, or that of ``--copy-to``.
    """
    stages = [stage for stage in ORDER if stage in config]
    unfinished = {name for stage in stages if not (trained / stage / FINISHED).exists() for name in trained_by(stage)}
    made = dict.fromkeys(name for stage in stages for name in trained_by(stage))
    return [name for name in made if name not in unfinished]


def foundations(component: str) -> set[str]:
    """The components that one was trained with, directly or through others."""
    if component == LORAS:
        return set(ADAPTED).union(*map(foundations, ADAPTED))
    if component == TURBO:
        return set().union(*map(foundations, ADAPTERS))
    found: set[str] = set()
    for stage in STAGES.values():
        # Stages only show pictures with the previewer; nothing learns from it.
        for need in stage.needs if component in stage.trains else ():
            found |= {need, *foundations(need)} - {"previewer"}
    return found | ({"tokenizer"} if component == "text_encoder" else set())


def plan(config: Mapping[str, Any], trained: Path, folder: Path) -> Shipment:
    """What the shipped folder would be made of.

    Args:
        folder: the folder that is shipped now; it need not exist.

    Raises:
        TrainingError: nothing is finished, or a component that every picture needs would have to be left out or is missing.
    """
    new = finished_components(config, trained)
    if not new:
        raise TrainingError(f"{trained} has no finished stage of the configuration.")
    lacking = [name for name in new if not (trained / "model" / name).is_dir()]
    if lacking:
        raise TrainingError(f"{trained / 'model'} has no {', '.join(lacking)}, although the stages are finished.")
    half = [name for name in ADAPTERS if name in new]
    if half and len(half) < len(ADAPTERS):  # one file has both
        new = [name for name in new if name not in half]
    covered = {*new, *([TURBO] if set(ADAPTERS) <= set(new) else [])}
    there = [
        name for name in ("tokenizer", *NETWORKS, TURBO, LORAS) if (folder / name).is_dir() and name not in covered
    ]
    left = [name for name in there if foundations(name) & set(new)]
    optional = (*CONTROLNETS, *EXTRAS)
    stuck = [name for name in left if name not in optional]
    if stuck:
        anew = ", ".join(sorted(foundations(stuck[0]) & set(new)))
        raise TrainingError(
            f"{stuck[0]} was trained with another {anew} than {trained} has, and is not finished there; train it first."
        )
    kept = [name for name in there if name not in left]
    missing = [name for name in ("tokenizer", *NETWORKS) if name not in (*optional, *new, *kept)]
    if missing:
        raise TrainingError(f"Neither {trained} nor {folder} has {', '.join(missing)}.")
    return Shipment(tuple(new), tuple(kept), tuple(left))


def ship(config: Mapping[str, Any], trained: Path, folder: Path) -> Shipment:
    """Makes the shipped folder, which stays as it is if something is wrong.

    It gets the components, ``model.json``, ``vocabulary.json`` and ``training.json``; its card and other files stay.

    Args:
        config, trained, folder: see `plan`.

    Raises:
        TrainingError: see `plan`; or a component is damaged, the folder would be too large, or it cannot be written.
        WeightsError: what was made cannot be read.
    """
    shipment = plan(config, trained, folder)
    objects = [item.name for item in load_objects()]
    times = merged_costs(read_costs(folder), costs(trained), shipment)
    with writing(folder), tempfile.TemporaryDirectory() as scratch, replacement(folder, without=OWN) as made:
        parts = Path(scratch)
        for name in shipment.new:
            (parts / name).symlink_to((trained / "model" / name).absolute())
        for name in (*shipment.kept, "model.json"):
            if (folder / name).exists():
                (parts / name).symlink_to((folder / name).absolute())
        assemble(config, parts, made)
        for name in shipment.kept:  # to the bit
            shutil.rmtree(made / name, ignore_errors=True)
            shutil.copytree(folder / name, made / name)
        opened = ModelFolder.open(made)
        about = ("name", "license", "native_size", "sampler", "stage_a_scale")
        write_model_json(made, **{field: getattr(opened, field) for field in about})
        for file, content in ((VOCABULARY, vocabulary(objects, STYLES)), (COSTS, times)):
            text = json.dumps(content, indent=1 if file == VOCABULARY else 2) + "\n"
            (made / file).write_text(text, encoding="utf-8")
        ModelFolder.open(made).verify()
        check_sizes(made)
    return shipment


def read_costs(folder: Path) -> dict[str, Any] | None:
    """A folder's ``training.json``; None if it has none.

    Raises:
        TrainingError: it is damaged.
    """
    return read_times(
        folder / COSTS, lambda content: {"stages": dict(content["stages"]), "calls": list(content["calls"])}
    )


def merged_costs(before: Mapping[str, Any] | None, new: dict[str, Any], shipment: Shipment) -> dict[str, Any]:
    """What the shipped components cost: that of a training, and that of the earlier ones whose components are kept.

    Args:
        before: see `read_costs`.
        new: see `recipe.costs`.
    """
    kept = {*shipment.kept, *(ADAPTERS if TURBO in shipment.kept else ())}
    stages = dict(before["stages"]) if before else {}
    stages = {
        stage: one for stage, one in stages.items() if stage not in new["stages"] and kept & set(trained_by(stage))
    }
    if not stages:
        return new
    calls = [call for call in before["calls"] if call not in new["calls"]] + new["calls"]
    together = stages | new["stages"]
    return {
        "seconds": sum(call["seconds"] for call in calls),
        "process_seconds": sum(one["process_seconds"] + one.get("ahead_seconds", 0) for one in together.values()),
        "calls": calls,
        "stages": {stage: together[stage] for stage in ORDER if stage in together},
    }


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of all files in a model folder, and of its parts that `LIMITS` has."""
    files = [file for file in folder.rglob("*") if file.is_file()]

    def size(*without: str, only: str | None = None) -> int:
        places = [(file, file.relative_to(folder).parts[0]) for file in files]
        return sum(file.stat().st_size for file, top in places if top not in without and only in (None, top))

    return dict(zip(LIMITS, (size(), size(*EXTRAS), size(only=LORAS)), strict=True))


def check_sizes(folder: Path) -> None:
    """Checks a model folder's sizes.

    Raises:
        TrainingError: one is above its limit.
    """
    for name, size in sizes(folder).items():
        if size > LIMITS[name]:
            raise TrainingError(
                f"The size {name} would be {size / 1e6:.2f} MB; it must be at most {LIMITS[name] / 1e6:g} MB."
            )


def add_loras(folder: Path, files: Sequence[Path]) -> None:
    """Puts LoRAs into a model folder, which stays as it is if something is wrong.

    Args:
        files: each gets the name of its folder's, if it is ``lora.safetensors``, as ``scripts/train-lora`` calls it.

    Raises:
        TrainingError: a file is missing, or the folder would be too large or cannot be written.
    """
    with writing(folder), replacement(folder) as made:
        (made / LORAS).mkdir(exist_ok=True)
        for file in files:
            name = file.absolute().parent.name if file.stem == "lora" else file.stem
            shutil.copyfile(file, made / LORAS / f"{name}.safetensors")
        check_sizes(made)
