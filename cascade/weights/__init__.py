"""Weights: where they come from, what a folder of them holds, how they are checked and read.

- ``folder``: model folders, and their networks; ``sums``: checksums of pieces, compared while a file is read.
- ``single_file``: checkpoints of other programs; ``recognise``: what a file is that none of these is.
- ``published``: tables of the published repositories; ``download`` fetches them, ``manifest`` notes what is there;
  ``build`` makes a model folder of a download, and of files and folders of one's own.

The names of ``folder`` are importable from here. They are loaded when first used: downloads need neither torch nor
transformers, which take seconds to import.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = import_module("cascade.weights.folder")
    try:
        return getattr(folder, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
