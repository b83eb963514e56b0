"""Weights: where they come from, what a folder of them holds, how they are checked and read.

- ``folder``: model folders and their networks; ``writing`` makes them.
- ``reading``: safetensors files; ``sums``: checksums of their pieces, compared while they are read.
- ``single_file``: the networks in files of other programs; ``sources``: files and folders of one's own;
  ``recognise``: what a file is that holds none of these.
- ``published``: tables of the published repositories; ``download`` fetches them and others from the ``hub``;
  ``manifest`` notes what is there; ``build`` makes a model folder of that, and of files and folders of one's own.

The names of ``folder`` and ``writing`` are importable from here. They are loaded when first used: downloads need neither
torch nor transformers, which take seconds to import.
"""

from importlib import import_module
from typing import Any

WRITING = ("replacement", "save_component", "save_model_folder", "write_model_json")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{'writing' if name in WRITING else 'folder'}")
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
