"""The command line of ``scripts/convert-lora``."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from cascade.weights.errors import WeightsError
from cascade.weights.folder import ModelFolder
from cascade.weights.lora import NETWORKS, Adapter, Placed, place
from cascade.weights.lora.writing import write
from cascade.weights.making import make
from cascade.weights.reading import read_header
from cascade.weights.variants import VARIANTS
from scripts.save_weights import MODEL_FOLDER

logger = logging.getLogger(__name__)

Shapes = dict[str, dict[str, tuple[int, ...]]]
# Words of the published tokenizer. Which ones they are does not matter here.
PUBLISHED_WORDS = 49408


def models(folder: Path | None) -> Iterator[tuple[Shapes, Mapping[str, int]]]:
    """Shapes and vocabularies of the models that an adapter may fit: a folder's, or the published full and lite ones.

    Raises:
        WeightsError: there is no such model folder, or it is damaged.
    """
    if folder is not None:
        opened = ModelFolder.open(folder)
        files = opened.standard_files(NETWORKS)
        shapes = {name: {key: shape for key, (shape, _) in read_header(paths).items()} for name, paths in files.items()}
        yield shapes, opened.load_component("tokenizer").get_vocab()
        return
    for ending in ("", "_lite"):
        shapes = {}
        for variant in VARIANTS:
            if variant.name in (f"prior{ending}", f"decoder{ending}", "text_encoder"):
                network = make(variant.network, variant.config)
                shapes[variant.component] = {key: tuple(one.shape) for key, one in network.state_dict().items()}
        yield shapes, {str(row): row for row in range(PUBLISHED_WORDS)}


def placed_in(adapter: Adapter, folder: Path | None) -> tuple[Placed, Shapes]:
    """An adapter in the first model that it fits.

    Raises:
        WeightsError: it fits no model. The sentence says why it does not fit the first.
    """
    first: WeightsError | None = None
    for shapes, vocabulary in models(folder):
        try:
            return place(adapter, shapes, vocabulary), shapes
        except WeightsError as error:
            first = first or error
    assert first is not None
    raise first


def main(arguments: list[str] | None = None) -> int:
    """``scripts/convert-lora``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/convert-lora",
        description="Convert an adapter to one safetensors file, with the names that ComfyUI reads, with alpha, and with "
        "its own words. Formats: docs/lora.md.",
    )
    parser.add_argument("source", type=Path, help="a safetensors file, a PEFT folder, a tar or a zip")
    parser.add_argument("target", type=Path, help="the new file")
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="JSON with module_filters and train_tokens of the authors' training (default: that beside the source)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help=f"the model folder that the adapter is for (default: {MODEL_FOLDER} if it exists, else the published sizes)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = options.model or (MODEL_FOLDER if MODEL_FOLDER.is_dir() else None)
    try:
        if options.settings is not None and not options.settings.is_file():
            raise WeightsError(f"There is no file {options.settings}.")
        adapter = Adapter.read(options.source, [] if options.settings is None else [options.settings])
        placed, shapes = placed_in(adapter, model)
        logger.info("%s: %s; %s.", options.source, adapter.format, placed.summary)
        with tempfile.TemporaryDirectory(dir=options.target.parent, prefix=".convert-lora-") as folder:
            made = Path(folder) / options.target.name
            write(placed, shapes, made)
            place(
                Adapter.read(made), shapes, {str(row): row for row in range(PUBLISHED_WORDS)}
            )  # the file must be readable
            os.replace(made, options.target)
        logger.info("%s is complete.", options.target)
    except WeightsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{options.target} cannot be written: {error.strerror}.\n")
        return 1
    except SafetensorError as error:
        sys.stderr.write(f"{options.target} cannot be written: {error}.\n")
        return 1
    return 0
