"""``scripts/download-weights``: its options, and what it tells the person who runs it."""

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

DOWNLOAD = ROOT / "weights" / ".download"  # hidden, so that neither git nor a container's image takes it


def names_of(allowed: dict[str, tuple[str, ...]]) -> Callable[[str], list[str]]:
    """An argparse type: some of these names, with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def main(arguments: list[str] | None = None) -> int:
    """``scripts/download-weights``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/download-weights", description="Fetch the published weights of Stable Cascade."
    )
    parser.add_argument("--prior", choices=PRIORS, default="full", help="Stage C (default: %(default)s)")
    parser.add_argument("--decoder", choices=DECODERS, default="full", help="Stage B (default: %(default)s)")
    parser.add_argument(
        "--with",
        dest="extras",
        type=names_of(EXTRAS),
        default=[],
        metavar="NAME,...",
        help=f"what else: {', '.join(EXTRAS)}",
    )
    parser.add_argument(
        "--only", action="store_true", help="nothing but what --with names, in addition to what is there already"
    )
    parser.add_argument(
        "--repository",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="another repository of the Hub, in addition to what is there already, or OWNER/NAME/PATH of a file or folder "
        "of it; may be repeated. Nothing published is fetched then, but what --with names",
    )
    parser.add_argument(
        "--output", type=Path, default=DOWNLOAD, metavar="DIR", help="the folder to fetch into (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.only and not options.extras:
        parser.error("--only needs --with")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs addresses, which are signed ones
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
        sys.stderr.write("Interrupted. What was downloaded is kept; run the same command again to go on.\n")
        return 130
    logger.info("All of it is in %s; scripts/save-weights makes a model folder of it.", options.output)
    return 0
