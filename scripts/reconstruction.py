"""The command line of ``scripts/reconstruct``: encodes a picture into semantic latents, and decodes it again.

An error prints one sentence and exits with code 1.
"""

import argparse
import logging
import sys
from pathlib import Path

from cascade.images.metadata import save_picture
from cascade.images.reading import read_picture
from cascade.pipeline import Cascade
from cascade.request import LARGEST_SEED
from cascade.weights import ModelFolder, WeightsError
from cascade.weights.hashing import sha256
from serving.early import find_weights
from serving.metadata import Detail, metadata
from serving.record import Origin, Record

logger = logging.getLogger(__name__)

ENDINGS = (".png", ".webp", ".jpg")


def reconstruct(weights: Path, source: Path, target: Path, prompt: str, seed: int) -> None:
    """Write the reconstruction of a picture.

    Raises:
        WeightsError: the weights are missing or damaged.
        ValueError: the source is not a picture; a side is outside of 64 to 4096 pixels; the model has no semantic encoder;
            or CASCADE_METADATA has another value than full, settings and none.
        OSError: a file cannot be read or written.
    """
    detail = Detail.from_environment()
    if not source.is_file():
        raise FileNotFoundError(f"There is no file {source}.")
    image = read_picture(source, str(source))
    cascade = Cascade.load(weights, log_prompts=detail is Detail.FULL)
    channels, rows, columns = cascade.encode(image).shape[1:]
    logger.info("%dx%d pixels become %d x %d x %d semantic latents.", *image.size, channels, rows, columns)
    made = cascade.reconstruct(image, seed, prompt)
    target.parent.mkdir(parents=True, exist_ok=True)
    record = Record(
        inputs={"prompt": prompt, "seed": seed},
        files=({"input": "picture", "sha256": sha256(source)},),
        sampler=cascade.defaults["decoder"].sampler,
        origin=Origin.of(cascade, ModelFolder.open(weights)),
        edited=True,
    )
    save_picture(made, target, metadata(record.of_picture(0, seed, *made.size), detail))


def main(arguments: list[str] | None = None) -> int:
    """``scripts/reconstruct``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/reconstruct", description="Encode a picture into semantic latents, and decode it again."
    )
    parser.add_argument("picture", type=Path, help="the picture's file, 64 to 4096 pixels a side")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("reconstruction.png"), metavar="PATH", help="default: %(default)s"
    )
    parser.add_argument("--prompt", default="", help="a description of the picture (default: empty)")
    parser.add_argument("--seed", type=int, default=0, help="seed of Stage B's noise (default: %(default)s)")
    parser.add_argument(
        "--weights", type=Path, metavar="DIR", help="the model folder (default: that of scripts/predict)"
    )
    options = parser.parse_args(arguments)
    if options.output.suffix not in ENDINGS:
        parser.error(f"-o is {options.output}; it must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if not 0 <= options.seed <= LARGEST_SEED:
        parser.error(f"--seed is {options.seed}; it must be from 0 to {LARGEST_SEED}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        reconstruct(options.weights or find_weights(), options.picture, options.output, options.prompt, options.seed)
    except (WeightsError, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.output}\n")
    return 0
