"""Makes the shipped model folder of what training wrote: ``python -m training.assemble CONFIG TRAINED FOLDER``.

Parameters are stored in bfloat16, statistics of batch norms in float32; ``model.json`` gets the sampler's defaults from the
configuration's table ``[model]`` and a checksum of every file.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessorPil

from cascade.weights import CONTROLNETS, NETWORKS, StageSettings, save_model_folder


def assemble(config: dict[str, Any], trained: Path, folder: Path) -> None:
    """Writes the model folder ``folder`` from the components below ``trained``.

    Raises:
        OSError: a component other than a ControlNet is missing.
    """
    size = config["image_encoder"]["image_size"]
    components: dict[str, Any] = {
        name: network.from_pretrained(trained / name)
        for name, network in NETWORKS.items()
        if name not in CONTROLNETS or (trained / name).is_dir()
    }
    components["tokenizer"] = AutoTokenizer.from_pretrained(trained / "tokenizer")
    components["feature_extractor"] = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    model = config["model"]
    save_model_folder(
        folder,
        components,
        name=model["name"],
        license=model["license"],
        native_size=config["data"]["size"],
        sampler={stage: StageSettings(**model[stage]) for stage in ("prior", "decoder")},
    )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    assemble(tomllib.loads(options.config.read_text()), options.trained, options.folder)


if __name__ == "__main__":
    main()
