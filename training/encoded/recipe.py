"""The configuration file of a training of Stage C on encoded pictures, such as ``training/published.toml``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade.networks.base import without_values
from cascade.networks.unet import StableCascadeUNet
from training.configuration import check_weight
from training.errors import TrainingError, summary
from training.options import Options
from training.tasks.encoded_stage_c import EncodedStageCTask
from training.values import check_values, kinds_of, read_toml

TABLES = {"prior": (dict, True), "options": (dict, True), "task": (dict, True)}
GIVEN = ("prior", "pictures")  # arguments of the task that no file has


@dataclass(frozen=True)
class Recipe:
    """All settings of one training.

    Attributes:
        prior: the arguments of Stage C's class; not used if a Stage C is trained further.
        options: see `training.options.Options`.
        task: the arguments of `EncodedStageCTask` other than networks and pictures.
    """

    prior: Mapping[str, Any]
    options: Options
    task: Mapping[str, Any]


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a configuration file.

    Raises:
        TrainingError: it is missing or not TOML, a value is unknown, missing or wrong, or no network can be built from it.
    """
    tables = read_toml(path, "configuration file")
    check_values("The configuration", tables, TABLES)
    prior, options, task = (tables[name] for name in TABLES)
    check_values("[prior]", prior, kinds_of(StableCascadeUNet))
    check_values("[options]", options, kinds_of(Options))
    check_values(
        "[task]", task, {name: kind for name, kind in kinds_of(EncodedStageCTask).items() if name not in GIVEN}
    )
    check_weight("[task]", task["weight"])
    try:
        with torch.device("meta"), without_values():
            StableCascadeUNet(**prior)
    except Exception as error:  # for wrong values, networks raise all kinds of errors
        raise TrainingError(f"No Stage C can be built from [prior]: {summary(error)}.") from error
    return Recipe(prior, Options(**options), task)
