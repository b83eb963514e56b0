"""The command line of ``scripts/save-weights``."""

import argparse
import logging
import sys
from pathlib import Path

from safetensors import SafetensorError

from cascade.networks.precisions import IN_8_BITS
from cascade.weights.build import save_model, save_own, verify
from cascade.weights.download import download_repository, named_repository
from cascade.weights.downloaded import compare
from cascade.weights.errors import WeightsError
from cascade.weights.manifest import DownloadError, Manifest, amount, remove_download
from cascade.weights.variants import TITLES
from scripts.download_weights import DOWNLOAD
from scripts.environment import ROOT

logger = logging.getLogger(__name__)

MODEL_FOLDER = ROOT / "weights" / "stable-cascade"


def repository_folder(name: str, download: Path) -> Path:
    """The folder of a downloaded repository of the Hub. Downloads it if it is missing; else checks that it is complete."""
    listed = Manifest.read(download).repositories if Manifest.file(download).is_file() else {}
    if name not in listed:
        return download_repository(name, download)
    compare(download, listed[name])
    repository, path = named_repository(name)
    return download / repository.folder / path


def confirmed(question: str) -> bool:
    """Whether the user says yes. False without a terminal."""
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


# The options for each component.
OPTIONS = {
    "prior": ("--prior", "--stage-c"),
    "decoder": ("--decoder", "--stage-b"),
    "vqgan": ("--vqgan", "--stage-a"),
    "text_encoder": ("--text-encoder",),
    "tokenizer": ("--tokenizer",),
    "image_encoder": ("--image-encoder",),
    "effnet": ("--effnet",),
    "previewer": ("--previewer",),
    "ip_adapter": ("--ip-adapter",),
}


def main(arguments: list[str] | None = None) -> int:
    """``scripts/save-weights``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/save-weights",
        description="Make a model folder from the download of scripts/download-weights, or from weights of your own: a "
        "folder, or a safetensors file with the names of the authors, diffusers, ComfyUI or kohya.",
    )
    for component, names in OPTIONS.items():
        title = TITLES.get(component, "the tokenizer").removeprefix("the ").removeprefix("an ").removeprefix("a ")
        parser.add_argument(*names, dest=component, type=Path, metavar="PATH", help=f"the {title} to use")
    parser.add_argument(
        "--controlnet", type=Path, action="append", default=[], metavar="PATH", help="a ControlNet; may be repeated"
    )
    parser.add_argument(
        "--repository",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="a repository of the Hub to use, downloaded if it is missing; may be repeated",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help=f"the model folder from which missing components are taken (default: {MODEL_FOLDER})",
    )
    parser.add_argument(
        "--precision",
        choices=("full", *IN_8_BITS),
        default="full",
        help="int8 or fp8: store the large networks in 8 bits, in half of the space; without a download, or with --base alone, "
        "those of model folders that exist (default: as they are)",
    )
    parser.add_argument("--name", help="the model's name (default: that of its file)")
    parser.add_argument(
        "--download",
        type=Path,
        default=DOWNLOAD,
        metavar="DIR",
        help="the folder of the download (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=MODEL_FOLDER,
        metavar="DIR",
        help="the model folder to make (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="make nothing; compare every file of the model folder with its checksum, and add checksums that older "
        "versions did not write",
    )
    parser.add_argument("--remove-download", action="store_true", help="remove the download afterwards without asking")
    options = parser.parse_args(arguments)
    asked = {component: path for component in OPTIONS if (path := getattr(options, component)) is not None}
    asked |= {f"controlnet-{number}": path for number, path in enumerate(options.controlnet)}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.verify:
            verify(options.output)
            logger.info("%s is complete and undamaged.", options.output)
            return 0
        own = asked or options.repository
        base = options.base or MODEL_FOLDER
        # Nothing but the precision changes.
        again = options.precision != "full" and (
            options.base is not None or not Manifest.file(options.download).is_file()
        )
        if own or again:
            folders = [repository_folder(name, options.download) for name in options.repository]
            more = {"base": base, "download": options.download, "name": options.name}
            save_own(asked, folders, options.output, precision=options.precision, **more)
        else:
            save_model(options.download, options.output, precision=options.precision)
        size = sum(file.stat().st_size for file in options.output.rglob("*") if file.is_file())
        logger.info("%s is complete: %s.", options.output, amount(size))
        # With weights of one's own, the rest of the download may be needed again.
        question = f"Remove the download in {options.download}?"
        if options.remove_download or (not (own or again) and confirmed(question)):
            remove_download(options.download)
    except (WeightsError, DownloadError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        file = error.filename2 or error.filename or options.output  # filename2 is the target of a copy
        sys.stderr.write(f"{file} cannot be written: {error.strerror}.\n")
        return 1
    except SafetensorError as error:
        sys.stderr.write(f"{options.output} cannot be written: {error}.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted. {options.output} is as it was.\n")
        return 130
    return 0
