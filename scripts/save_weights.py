"""``scripts/save-weights``: its options, and what it tells the person who runs it."""

import argparse
import logging
import sys
from pathlib import Path

from safetensors import SafetensorError

from cascade.weights.build import save_model
from cascade.weights.folder import WeightsError
from cascade.weights.manifest import DownloadError, amount, remove_download
from scripts.download_weights import DOWNLOAD
from scripts.environment import ROOT

logger = logging.getLogger(__name__)

MODEL_FOLDER = ROOT / "weights" / "stable-cascade"


def confirmed(question: str) -> bool:
    """What a person at a terminal answers; no if there is none."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def main(arguments: list[str] | None = None) -> int:
    """``scripts/save-weights``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/save-weights", description="Make a model folder of what scripts/download-weights fetched."
    )
    parser.add_argument(
        "--download", type=Path, default=DOWNLOAD, metavar="DIR", help="the folder fetched into (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=MODEL_FOLDER, metavar="DIR", help="the model folder (default: %(default)s)"
    )
    parser.add_argument("--remove-download", action="store_true", help="remove the download afterwards without asking")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        save_model(options.download, options.output)
        size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
        logger.info("%s is complete: %s.", options.output, amount(size))
        if options.remove_download or confirmed(f"Remove the download in {options.download}?"):
            remove_download(options.download)
    except (WeightsError, DownloadError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        file = error.filename2 or error.filename or options.output  # of a copy the second one
        sys.stderr.write(f"{file} cannot be written: {error.strerror}.\n")
        return 1
    except SafetensorError as error:
        sys.stderr.write(f"{options.output} cannot be written: {error}.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. {options.output} is as it was.\n")
        return 130
    return 0
