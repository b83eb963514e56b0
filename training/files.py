"""Files that are complete or not there, whenever the process is killed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to. It takes the place of ``path`` when the block ends, and vanishes if it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_components(model: Path, owner: str, write: Callable[[Path], object]) -> None:
    """Writes components of a model folder; each stays readable, old or new, at every moment.

    A new component's folder appears at once. A folder cannot take the place of another in one step, but a file can: the files
    of a component that exists are replaced one by one, which is safe as long as the network keeps its sizes.

    Args:
        model: the model folder.
        owner: who writes, for the name of the folder where the new files are made; two owners can write at the same time.
        write: is given a folder, and writes each component to a sub-folder of it.
    """
    model.mkdir(parents=True, exist_ok=True)
    part = model / f".{owner}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        write(part)
        for made in sorted(part.iterdir()):
            _replace(made, model / made.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _replace(made: Path, target: Path) -> None:
    if target.is_symlink():  # what it leads to belongs to another model folder
        target.unlink()
    if made.is_file() or not target.exists():
        made.replace(target)
        return
    new = {file.name for file in made.iterdir()}
    for name in sorted(new):
        os.replace(made / name, target / name)
    for file in target.iterdir():  # weights of an earlier form, which a reader might prefer
        if ".safetensors" in file.name and file.name not in new:
            file.unlink()
