"""Reads and checks the configuration file of a training: names, types and ranges of all values.

`agreement` checks whether the tables fit together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPVisionConfig

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sizes import MULTIPLE, SMALLEST, WHOLE
from cascade.weights import StageSettings
from training.errors import TrainingError
from training.objective import WEIGHTS
from training.options import Options
from training.sources import find_source, options_of
from training.stages import STAGES, Stage
from training.tasks.controlnet import CONTROL_KINDS
from training.tasks.tokenizer import SMALLEST_VOCABULARY
from training.values import Count, Kinds, check_values, kinds_of, read_toml

NETWORK_TABLES: dict[str, Callable[..., Any]] = {
    "vqgan": StageA,
    "text_encoder": CLIPTextConfig,
    "image_encoder": CLIPVisionConfig,
    "effnet": SemanticEncoder,
    "previewer_network": Previewer,
    "decoder": StableCascadeUNet,
    "prior": StableCascadeUNet,
    "ip_adapter_network": IPAdapter,
}
"""The class whose arguments each table holds."""

DATA: Kinds = {
    "size": (int, True),
    "other_sizes": (tuple[tuple[int, int], ...], False),
    "other_sizes_every": (Count, False),
    "source": (str, False),
}
"""The values of ``[data]``; a source adds its own options."""
MODEL: Kinds = {"name": (str, True), "license": (str, True), "prior": (dict, True), "decoder": (dict, True)}
OTHER_TABLES: dict[str, Kinds] = {
    "tokenizer": {"vocabulary": (int, True)},
    "controlnet": {"proj_blocks": (tuple[int, ...], True)},
}


def read_configuration(path: Path) -> dict[str, Any]:
    """The tables of a configuration file, checked by `check_tables`.

    Raises:
        TrainingError: the file is missing or not TOML, or a value is unknown, missing or wrong.
    """
    config = read_toml(path, "configuration file")
    check_tables(config)
    return config


def check_tables(config: Mapping[str, Any]) -> None:
    """Checks the names, types and ranges of all values.

    Raises:
        TrainingError: one is unknown, missing or wrong.
    """
    known = ("model", "data", *OTHER_TABLES, *NETWORK_TABLES, *STAGES)
    options = _source_options(config)
    for name, table in config.items():
        if name not in known:
            raise TrainingError(f"The configuration has an unknown table [{name}]; there are {', '.join(known)}.")
        if not isinstance(table, dict):
            raise TrainingError(f"{name} is {table!r}; it must be a table, [{name}].")
        if name in STAGES:
            _check_stage(name, table, options)
        elif name in NETWORK_TABLES:
            check_values(f"[{name}]", table, kinds_of(NETWORK_TABLES[name]))
        else:
            check_values(f"[{name}]", table, {"model": MODEL, "data": {**DATA, **options}, **OTHER_TABLES}[name])
    if "model" in config:
        for stage in ("prior", "decoder"):
            check_values(f"[model] {stage}", config["model"][stage], kinds_of(StageSettings))
            try:
                StageSettings(**config["model"][stage])
            except ValueError as error:
                raise TrainingError(f"[model] {stage}: {error}.") from None
    if "tokenizer" in config and config["tokenizer"]["vocabulary"] < SMALLEST_VOCABULARY:
        raise TrainingError(
            f"[tokenizer] vocabulary is {config['tokenizer']['vocabulary']}; it must be at least {SMALLEST_VOCABULARY}: two "
            "symbols for each byte (inside and at the end of a word), and two special tokens."
        )
    if "data" not in config:
        raise TrainingError("The configuration has no table [data], with the size of pictures.")
    for side in (config["data"]["size"], *(side for size in config["data"].get("other_sizes", ()) for side in size)):
        if side % MULTIPLE or not SMALLEST <= side <= WHOLE:
            where = "size is" if side == config["data"]["size"] else "other_sizes holds"
            raise TrainingError(
                f"[data] {where} {side}; it must be a multiple of {MULTIPLE} from {SMALLEST} to {WHOLE}."
            )


def _source_options(config: Mapping[str, Any]) -> Kinds:
    """The options of the source that ``[data]`` names. All may be missing, because a folder of pictures needs none."""
    data = config.get("data")
    name = data.get("source") if isinstance(data, dict) else None
    if not isinstance(name, str):  # another type is refused with the table
        return {}
    return {option: (kind, False) for option, (kind, _) in options_of(find_source(name)).items()}


def _check_stage(name: str, table: Mapping[str, Any], options: Kinds) -> None:
    stage = STAGES[name]
    kinds = {"options": (dict, True), "task": (dict, False), "data": (dict, False)}
    if stage.control:
        kinds["control"] = (dict, False)
    check_values(f"[{name}]", table, kinds)
    where = f"[{name}] options"
    check_values(where, table["options"], kinds_of(Options))
    try:
        Options(**table["options"])
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from None
    check_values(f"[{name}] data", table.get("data", {}), options)
    if stage.control:
        check_values(f"[{name}] control", table.get("control", {}), kinds_of(CONTROL_KINDS[stage.control]))
    arguments = table.get("task", {})
    check_values(f"[{name}] task", arguments, task_kinds(stage))
    if "weight" in arguments:
        check_weight(f"[{name}] task", arguments["weight"])


def check_weight(where: str, weight: Mapping[str, Any]) -> None:
    """Checks the table ``weight``, see `objective.loss_weight`.

    Args:
        where: the name of the table that has it, in an error.

    Raises:
        TrainingError: its kind, or a value, is unknown or wrong.
    """
    values = dict(weight)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in WEIGHTS:
        raise TrainingError(f"{where}: weight.kind is {kind!r}; it must be one of {', '.join(WEIGHTS)}.")
    check_values(f"{where}: weight", values, kinds_of(WEIGHTS[kind]))


def task_kinds(stage: Stage) -> Kinds:
    """The values of ``[stage.task]``: the task's arguments without those that `workshop` gives it."""
    given = (*stage.needs, "dataset", "unseen", "shapes", "control", "name", "settings")
    kinds = list(kinds_of(stage.task).items())[0 if stage.adapts else len(stage.trains) :]
    return {name: kind for name, kind in kinds if name not in given}
