"""The command line of ``scripts/download-weights``."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from cascade.weights.download import download, download_repository, select_parts
from cascade.weights.manifest import DownloadError
from cascade.weights.published import DECODERS, EXTRAS, PRIORS
from scripts.environment import ROOT

logger = logging.getLogger(__name__)

DOWNLOAD = ROOT / "weights" / ".download"  # hidden, so that git and container images leave it out


def names_of(allowed: dict[str, tuple[str, ...]]) -> Callable[[str], list[str]]:
    """An argparse type for a comma-separated list of allowed names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def main(arguments: list[str] | None = None) -> int:
    """``scripts/download-weights``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/download-weights", description="Download the published weights of Stable Cascade."
    )
    parser.add_argument("--prior", choices=PRIORS, default="full", help="Stage C (default: %(default)s)")
    parser.add_argument("--decoder", choices=DECODERS, default="full", help="Stage B (default: %(default)s)")
    parser.add_argument(
        "--with",
        dest="extras",
        type=names_of(EXTRAS),
        default=[],
        metavar="NAME,...",
        help=f"extras to download: {', '.join(EXTRAS)}",
    )
    parser.add_argument(
        "--only", action="store_true", help="download only the extras of --with; keep what is there already"
    )
    parser.add_argument(
        "--repository",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="download another repository of the Hub, or OWNER/NAME/PATH, a file or folder in it; may be repeated. Keeps what "
        "is there already. Of the published weights, it then downloads only the extras of --with",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DOWNLOAD,
        metavar="DIR",
        help="the folder to download into (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.only and not options.extras:
        parser.error("--only needs --with")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs URLs, which are signed
    only = options.only or bool(options.repository)
    parts = select_parts(options.prior, options.decoder, options.extras, only=only)
    try:
        if parts:
            download(parts, options.output, add=only)
        for name in options.repository:
            download_repository(name, options.output)
    except DownloadError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"{error.filename or options.output} cannot be used: {error.strerror}.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. What has arrived is kept; run the same command again to resume.\n")
        return 130
    logger.info("The download in %s is complete; scripts/save-weights makes a model folder from it.", options.output)
    return 0
