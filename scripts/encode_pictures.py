"""The command line of ``scripts/encode-pictures``; several processes start this module, see docs/training.md."""

import argparse
import logging
import sys
from pathlib import Path

from serving.settings import find_weights
from training.encoded.encoding import encode_pictures
from training.errors import TrainingError
from training.lora.settings import RESOLUTIONS


def main(arguments: list[str] | None = None) -> int:
    """Command line; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/encode-pictures", description="Encode captioned pictures for training."
    )
    parser.add_argument("pictures", type=Path, help="a folder of pictures or of tar files, or a tar file")
    parser.add_argument("output", type=Path, help="the folder of encoded pictures")
    parser.add_argument(
        "--weights",
        type=Path,
        default=find_weights(),
        help="the model folder (default: CASCADE_WEIGHTS, else weights/stable-cascade, else weights/mini)",
    )
    parser.add_argument(
        "--resolution", type=int, help="pixels of a side of a square of the pictures' area (default: the model's own)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        if options.resolution is not None:
            RESOLUTIONS.check("--resolution", options.resolution)
        encode_pictures(options.pictures, options.output, options.weights, options.resolution)
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
