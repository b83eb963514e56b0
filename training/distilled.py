"""Puts what the stages distil_c and distil_b made into a model folder: ``python -m training.distilled TRAINED FOLDER``.

The engine uses it for the speed "turbo". `training.assemble` does the same for a new model folder.
"""

import argparse
import json
import sys
from pathlib import Path

import safetensors.torch

from cascade.weights import DISTILLED, TURBO, WeightsError, replacement, write_model_json
from cascade.weights.build import describe
from cascade.weights.hashing import sha256
from cascade.weights.names import SUFFIX
from cascade.weights.writing import link
from training.errors import FILE_ERRORS, TrainingError, summary, writing
from training.stages import STAGES, advice
from training.tasks.distil import FILE

ADAPTERS = tuple(name for stage in STAGES.values() if stage.adapts for name in stage.trains)


def distilled(trained: Path) -> bytes | None:
    """The content of the file for the speed "turbo"; None if no adapter was trained.

    Args:
        trained: the folder ``model`` in a training's folder.

    Raises:
        TrainingError: some of the adapters are missing, or one is damaged.
    """
    lacking = [name for name in ADAPTERS if not (trained / name).is_dir()]
    if lacking == list(ADAPTERS):
        return None
    if lacking:
        raise TrainingError(f"{trained} has no {', '.join(lacking)}: {advice(lacking)}.")
    tensors = {}
    for file in (trained / name / FILE for name in ADAPTERS):
        try:
            tensors |= safetensors.torch.load_file(file)
        except FILE_ERRORS as error:
            raise TrainingError(f"{file} cannot be read: {summary(error)}.") from error
    return safetensors.torch.save(tensors)


def earlier(trained: Path) -> bytes | None:
    """The content of the file for the speed "turbo" that a model folder had before it was trained further.

    Args:
        trained: the folder ``model`` in a training's folder, a copy of the model folder.

    Returns:
        None if there is none, or if Stages C and B are no longer those that it was made for.

    Raises:
        TrainingError: a file is damaged.
    """
    file, listing = trained / DISTILLED, trained / "model.json"
    if not (file.is_file() and listing.is_file()):
        return None
    try:
        sums = json.loads(listing.read_text(encoding="utf-8"))["files"]
        of_stages = [path for path in sums if path.startswith(("prior/", "decoder/")) and path.endswith(SUFFIX)]
        if any(not (trained / path).is_file() or sha256(trained / path) != sums[path] for path in of_stages):
            return None
        return file.read_bytes()
    except FILE_ERRORS as error:
        raise TrainingError(f"{listing} or {file} cannot be read: {summary(error)}.") from error


def add(trained: Path, folder: Path) -> None:
    """Adds the file to a model folder. A killed process leaves the folder as it was.

    Raises:
        TrainingError: see `distilled`; or none was trained, or the folder cannot be written.
        WeightsError: it is not a model folder.
    """
    content = distilled(trained)
    if content is None:
        raise TrainingError(f"{trained} has no {', '.join(ADAPTERS)}: {advice(list(ADAPTERS))}.")
    about = describe([], folder)
    with writing(folder), replacement(folder, without=(TURBO,), copy=link) as made:
        (made / DISTILLED).parent.mkdir()
        (made / DISTILLED).write_bytes(content)
        write_model_json(made, **about)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="training.distilled", description=__doc__.split("\n")[0])
    parser.add_argument("trained", type=Path, help="the folder 'model' in a training's folder")
    parser.add_argument("folder", type=Path, help="the model folder")
    options = parser.parse_args(arguments)
    try:
        add(options.trained, options.folder)
    except (TrainingError, WeightsError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
