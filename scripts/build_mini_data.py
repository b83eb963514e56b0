"""Builds the miniature's drawings from three open icon sets, which are npm packages."""

import argparse
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from miniature.icons import ICON_SETS, OBJECT_LIST, IconSet, pack_drawings, read_icon_set, save_objects, select_objects
from scripts.environment import ROOT
from training.errors import TrainingError, writing
from training.files import whole_file


def package_file(icon_set: IconSet, folder: Path) -> Path:
    """The file of a set's package in `folder`, with the name that npm gives it."""
    return folder / f"{icon_set.package.lstrip('@').replace('/', '-')}-{icon_set.version}.tgz"


def tarball(icon_set: IconSet, folder: Path, scratch: Path) -> Path:
    """The package's file in `folder`. npm downloads it if it is missing.

    Raises:
        TrainingError: npm is not installed or fails.
    """
    file = package_file(icon_set, folder)
    if not file.exists():
        package = f"{icon_set.package}@{icon_set.version}"
        print(f"Downloading {package}.", flush=True)
        try:
            subprocess.run(["npm", "pack", package, "--silent"], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise TrainingError(f"npm is not installed, and {file} is missing; --icons names its folder.") from None
        except subprocess.CalledProcessError as error:
            raise TrainingError(f"npm pack {package} failed with exit code {error.returncode}.") from None
        with whole_file(file) as part:
            shutil.copyfile(scratch / file.name, part)
    return file


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/build-mini-data", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "mini" / "drawings.zip",
        help="default: %(default)s",
    )
    parser.add_argument("--icons", type=Path, help="folder of the packages' files (default: a temporary folder)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build(options.output, options.icons)
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def build(output: Path, icons: Path | None, listing: Path = OBJECT_LIST) -> None:
    """Draw the objects that all icon sets have, and list them.

    Args:
        output: the file to write.
        icons: the folder of the packages' files; missing ones are downloaded into it. None: a temporary folder.
        listing: the object list to write.

    Raises:
        TrainingError: a package cannot be downloaded or is damaged, or the file cannot be written.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = icons or scratch / "icons"
        folder.mkdir(parents=True, exist_ok=True)
        sets = []
        for icon_set in ICON_SETS:
            file = tarball(icon_set, folder, scratch)
            try:
                with tarfile.open(file) as archive:
                    archive.extract("package/icons.json", scratch / icon_set.key, filter="data")
            except (tarfile.TarError, EOFError, KeyError) as error:
                raise TrainingError(
                    f"{file} is not a complete package of {icon_set.package}: {error}. Remove it."
                ) from error
            sets.append(read_icon_set(scratch / icon_set.key / "package" / "icons.json"))
        objects = select_objects(sets)
        save_objects(objects, listing)
        with writing(output):
            pack_drawings(objects, sets, output)
