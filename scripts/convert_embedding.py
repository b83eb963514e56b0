"""The command line of ``scripts/convert-embedding``."""

import argparse
import logging
from pathlib import Path

from cascade.prompts.conversion import convert
from cascade.prompts.embeddings import SUFFIX

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """``scripts/convert-embedding``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/convert-embedding",
        description="Convert textual-inversion embeddings from pickles to safetensors files beside them, without running code "
        "in the pickles.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file that torch.save wrote (.pt, .bin)")
    parser.add_argument(
        "--width",
        type=int,
        default=1280,
        help="width of the model's text encoder, to choose from a file for several text encoders (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    failed = 0
    for source in options.files:
        target = source.with_suffix(SUFFIX)
        try:
            if target.exists():
                raise ValueError(f"{target} exists already.")
            count, width = convert(source, target, options.width)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            failed += 1
        else:
            logger.info("%s has %d vectors of %d numbers.", target, count, width)
    return min(failed, 1)
