"""Writes files so that they are complete or absent, even if the process is killed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file beside ``path`` to write to. It replaces ``path`` when the block ends, and is deleted if the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_components(model: Path, owner: str, write: Callable[[Path], object]) -> None:
    """Writes components of a model folder. Each stays readable at every moment, in its old or its new form.

    The folder of a new component appears complete. An existing folder cannot be replaced in one step, but its files can, one by
    one; that is safe because the network keeps its sizes.

    Args:
        model: the model folder.
        owner: name of the writer; different owners may write at the same time.
        write: called with a folder; writes each component to a sub-folder of it.
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
    if target.is_symlink():  # its target belongs to another model folder
        target.unlink()
    if made.is_file() or not target.exists():
        made.replace(target)
        return
    new = {file.name for file in made.iterdir()}
    for name in sorted(new):
        os.replace(made / name, target / name)
    for file in target.iterdir():  # older weights under another name, which a reader might prefer
        if ".safetensors" in file.name and file.name not in new:
            file.unlink()
