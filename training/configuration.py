"""The configuration file of a training: read, and checked before anything is trained.

Here, what a table holds: names, kinds and ranges of its values. Whether the tables agree is `agreement`'s part.
"""

import inspect
import math
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from transformers import CLIPTextConfig, CLIPVisionConfig

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sizes import LARGEST, MULTIPLE, SMALLEST
from cascade.weights import StageSettings
from training.errors import TrainingError
from training.objective import WEIGHTS
from training.options import Options
from training.stages import STAGES, Stage
from training.tasks.controlnet import CONTROL_KINDS
from training.tasks.tokenizer import SMALLEST_VOCABULARY

NETWORK_TABLES: dict[str, Callable[..., Any]] = {
    "vqgan": StageA,
    "text_encoder": CLIPTextConfig,
    "image_encoder": CLIPVisionConfig,
    "effnet": SemanticEncoder,
    "previewer_network": Previewer,
    "decoder": StableCascadeUNet,
    "prior": StableCascadeUNet,
}
"""What takes a table's values."""

Kinds = Mapping[str, tuple[Any, bool]]
"""Of each name that a table may hold, the type, and whether it must be there."""

SCENES: Kinds = {"scenes": (int, False), "unseen": (int, False), "seed": (int, False), "unsaid": (float, False)}
DATA: Kinds = {"size": (int, True), "other_sizes": (tuple[tuple[int, int], ...], False), **SCENES}
MODEL: Kinds = {"name": (str, True), "license": (str, True), "prior": (dict, True), "decoder": (dict, True)}
OTHER_TABLES: dict[str, Kinds] = {
    "model": MODEL,
    "data": DATA,
    "tokenizer": {"vocabulary": (int, True)},
    "controlnet": {"proj_blocks": (tuple[int, ...], True)},
}
SHARES = ("drop_text", "keep_image", "drop_semantic", "unsaid", "inverted")
AMOUNTS = ("latent_noise", "semantic_noise", "offset_noise", "pyramid", "preview_weight", "naming", "k", "floor")
COUNTS = ("scenes", "unseen")


def read_configuration(path: Path) -> dict[str, Any]:
    """The tables of a configuration file, each checked by itself.

    Raises:
        TrainingError: there is no such file, it is not TOML, or a table has an unknown, missing or wrong value.
    """
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise TrainingError(f"There is no configuration file {path}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"{path} is no TOML file: {error}.") from error
    check_tables(config)
    return config


def check_tables(config: Mapping[str, Any]) -> None:
    """Checks the names, kinds and ranges of all values.

    Raises:
        TrainingError: one is unknown, missing or wrong.
    """
    known = (*OTHER_TABLES, *NETWORK_TABLES, *STAGES)
    for name, table in config.items():
        if name not in known:
            raise TrainingError(f"The configuration has an unknown table [{name}]; there are {', '.join(known)}.")
        if not isinstance(table, dict):
            raise TrainingError(f"{name} is {table!r}; it must be a table, [{name}].")
        if name in STAGES:
            _check_stage(name, table)
        elif name in NETWORK_TABLES:
            check_values(f"[{name}]", table, kinds_of(NETWORK_TABLES[name]))
        else:
            check_values(f"[{name}]", table, OTHER_TABLES[name])
    if "model" in config:
        for stage in ("prior", "decoder"):
            check_values(f"[model] {stage}", config["model"][stage], kinds_of(StageSettings))
    if "tokenizer" in config and config["tokenizer"]["vocabulary"] < SMALLEST_VOCABULARY:
        raise TrainingError(
            f"[tokenizer] vocabulary is {config['tokenizer']['vocabulary']}; it must be at least {SMALLEST_VOCABULARY}: a "
            "symbol for each byte, alone and at the end of a word, and two special tokens."
        )
    if "data" not in config:
        raise TrainingError("The configuration has no table [data], with the size of pictures.")
    for side in (config["data"]["size"], *(side for size in config["data"].get("other_sizes", ()) for side in size)):
        if side % MULTIPLE or not SMALLEST <= side <= LARGEST:
            where = "size is" if side == config["data"]["size"] else "other_sizes holds"
            raise TrainingError(
                f"[data] {where} {side}; it must be a multiple of {MULTIPLE} from {SMALLEST} to {LARGEST}."
            )


def _check_stage(name: str, table: Mapping[str, Any]) -> None:
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
    check_values(f"[{name}] data", table.get("data", {}), SCENES)
    if stage.control:
        check_values(f"[{name}] control", table.get("control", {}), kinds_of(CONTROL_KINDS[stage.control]))
    arguments = table.get("task", {})
    check_values(f"[{name}] task", arguments, task_kinds(stage))
    if "weight" in arguments:
        weight = dict(arguments["weight"])
        kind = weight.pop("kind", None)
        if kind not in WEIGHTS:
            raise TrainingError(f"[{name}] task: weight.kind is {kind!r}; it must be one of {', '.join(WEIGHTS)}.")
        check_values(f"[{name}] task: weight", weight, kinds_of(WEIGHTS[kind]))


def task_kinds(stage: Stage) -> Kinds:
    """What a task's table may hold: the arguments that do not come from elsewhere."""
    given = (*stage.needs, "dataset", "unseen", "shapes", "control", "name")
    kinds = list(kinds_of(stage.task).items())[len(stage.trains) :]
    return {name: kind for name, kind in kinds if name not in given}


def kinds_of(function: Callable[..., Any]) -> Kinds:
    """What a function, or a class, can be called with."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name: (parameter.annotation, parameter.default is parameter.empty)
        for parameter in parameters
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def check_values(where: str, given: Mapping[str, Any], kinds: Kinds) -> None:
    """Checks a table's names, kinds and ranges.

    Args:
        where: the table, as the sentence calls it.
        given: what it holds.
        kinds: what it may hold.

    Raises:
        TrainingError: one is unknown, missing or wrong.
    """
    for name, value in given.items():
        if name not in kinds:
            raise TrainingError(f"{where} has an unknown value {name}; {_list(kinds)}.")
        kind, _ = kinds[name]
        if not fits(value, kind):
            raise TrainingError(f"{where} {name} is {value!r}; it must be {describe(kind)}.")
        if name in SHARES and not 0 <= value <= 1:
            raise TrainingError(f"{where} {name} is {value}; it must be from 0 to 1.")
        if name in AMOUNTS and value < 0:
            raise TrainingError(f"{where} {name} is {value}; it must not be negative.")
        if name in COUNTS and value < 1:
            raise TrainingError(f"{where} {name} is {value}; it must be at least 1.")
    for name, (_, needed) in kinds.items():
        if needed and name not in given:
            raise TrainingError(f"{where} lacks {name}.")


def _list(names: Collection[str]) -> str:
    return f"there are {', '.join(names)}" if names else "there are none"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from a TOML file can be an argument that is annotated with ``kind``. Unknown annotations take all."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(fits(one, arguments[0]) for one in value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool, str, dict):
        return type(value) is kind
    if kind is types.NoneType:
        return value is None
    if isinstance(kind, type):
        return isinstance(value, kind)
    if isinstance(origin, type):  # Mapping[str, Any]
        return isinstance(value, origin)
    return True


def describe(kind: Any) -> str:
    """An annotation in words, for whoever writes a TOML file."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table"}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(one) for one in arguments if one is not types.NoneType)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        plural = arguments[-1] is Ellipsis
        inner = describe(arguments[0])
        return f"a list, each {inner}" if plural else f"a list of {len(arguments)} values, each {inner}"
    return words.get(kind, "a table" if isinstance(origin, type) else getattr(kind, "__name__", str(kind)))
