"""Makes a model folder of the trained components: ``python -m training.assemble CONFIG TRAINED FOLDER``.

Parameters are stored in bfloat16, and statistics of batch normalisations in float32. ``model.json`` gets the sampler's defaults,
which are in the table ``[model]`` of the configuration, and a checksum of every file.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.images.preprocessing import ClipPreprocessor
from cascade.weights import CONTROLNETS, DISTILLED, NETWORKS, StageSettings, save_model_folder
from training.configuration import read_configuration
from training.distilled import distilled, earlier
from training.errors import TrainingError, writing
from training.stages import advice
from training.workshop import load_component

EXTRAS = (*CONTROLNETS, "ip_adapter")
"""Networks that a model folder need not have."""


def assemble(config: Mapping[str, Any], trained: Path, folder: Path) -> None:
    """Writes the model folder ``folder`` from the components in ``trained``. ControlNets, the IP-Adapter, and the adapters for
    the speed "turbo" may be missing. An earlier adapter for that speed in ``trained`` is kept while it fits.

    Raises:
        TrainingError: the configuration has no table [model], a component is missing or damaged, or the folder cannot be
            written.
    """
    if "model" not in config:
        raise TrainingError("The configuration has no table [model], with the model's name, license and samplers.")
    names = ["tokenizer", *(name for name in NETWORKS if name not in EXTRAS)]
    lacking = [name for name in names if not (trained / name).is_dir()]
    if lacking:
        raise TrainingError(f"{trained} has no {', '.join(lacking)}: {advice(lacking)}.")
    turbo = distilled(trained) or earlier(trained)
    names += [name for name in EXTRAS if (trained / name).is_dir()]
    components = {name: load_component(trained, name) for name in names}
    size = components["image_encoder"].config.image_size
    components["feature_extractor"] = ClipPreprocessor(size=size, crop=(size, size))
    model = config["model"]
    with writing(folder):
        save_model_folder(
            folder,
            components,
            name=model["name"],
            license=model["license"],
            native_size=config["data"]["size"],
            sampler={stage: StageSettings(**model[stage]) for stage in ("prior", "decoder")},
            extras={} if turbo is None else {DISTILLED: turbo},
        )


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="training.assemble", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("trained", type=Path, help="the folder 'model' in a training's folder")
    parser.add_argument("folder", type=Path, help="the model folder to write")
    options = parser.parse_args(arguments)
    try:
        assemble(read_configuration(options.config), options.trained, options.folder)
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
