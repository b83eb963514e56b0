"""Fetches missing weights before a server loads them, if the environment variable CASCADE_DOWNLOAD asks for it.

It does what `scripts/download-weights`, `scripts/save-weights` and a deletion of the download do. So the model folder appears
when it is complete, and a download that was interrupted goes on.
"""

import logging
import time
from pathlib import Path

from cascade.weights.build import components_in, save_model
from cascade.weights.download import download, select_parts
from cascade.weights.errors import WeightsError
from cascade.weights.locking import locked
from cascade.weights.manifest import DownloadError, amount, remove_download
from cascade.weights.published import DECODERS, EXTRAS, PARTS

logger = logging.getLogger(__name__)

NAME = "CASCADE_DOWNLOAD"
SIZES = tuple(DECODERS)
LOCK = ".fetching.lock"


def parts_named(text: str) -> list[str]:
    """The keys of `PARTS` that a value of CASCADE_DOWNLOAD names: "full" or "lite", then any of `EXTRAS`, with commas.

    Raises:
        ValueError: it names something else.
    """
    size, *extras = [name.strip() for name in text.split(",")]
    if size not in SIZES or not set(extras) <= set(EXTRAS):
        raise ValueError(
            f"{NAME} is {text!r}; it must be {' or '.join(SIZES)}, which {', '.join(EXTRAS)} may follow, with commas."
        )
    return select_parts(size, size, extras)


def fetch_missing(text: str, folder: Path) -> None:
    """Download the parts that a model folder lacks, and add them to it. Logs the rate.

    A component that is there is kept, also if it has another size than the one asked for. Other processes that fetch into
    the same place are waited for.

    Args:
        text: the value of CASCADE_DOWNLOAD; empty: fetch nothing.
        folder: the model folder; it need not exist.

    Raises:
        ValueError: see `parts_named`.
        WeightsError: the download failed, or the files are not the Hub's. What has arrived is kept.
    """
    if not text:
        return
    wanted = parts_named(text)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # at INFO it logs URLs, which are signed
    if not _missing(wanted, folder):
        logger.info("%s: %s has all of it.", NAME, folder)
        return

    def say_busy() -> None:
        logger.info("Another process fetches weights into %s: waiting for it.", folder.parent)

    try:
        with locked(folder.parent / LOCK, say_busy):
            if parts := _missing(wanted, folder):
                _fetch(parts, folder)
    except DownloadError as error:
        raise WeightsError(f"{NAME}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{NAME}: {error.filename or folder} cannot be written: {error.strerror}.") from None


def _missing(parts: list[str], folder: Path) -> list[str]:
    there = components_in(folder)
    return [part for part in parts if PARTS[part].component not in there]


def _fetch(parts: list[str], folder: Path) -> None:
    scratch = folder.parent / ".download"  # hidden, like that of scripts/download-weights
    before, start = _bytes(scratch), time.perf_counter()
    download(parts, scratch)
    fetched, seconds = _bytes(scratch) - before, time.perf_counter() - start
    logger.info("Fetched %s in %.1f s, %.0f MB/s.", amount(fetched), seconds, fetched / seconds / 1e6)
    start = time.perf_counter()
    save_model(scratch, folder)
    remove_download(scratch)
    logger.info("Checked %s, and added it to %s, in %.1f s.", ", ".join(parts), folder, time.perf_counter() - start)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
