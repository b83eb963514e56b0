"""Weights: download, check, convert and load them.

- ``folder``: opens model folders and loads their networks. ``writing`` writes model folders.
- ``reading``: reads safetensors files. ``sums``: checksums of their pieces, compared during reading. ``hashing``: sha256.
  ``locking``: a lock that one process at a time holds.
- ``base``: reads weights of a loaded network again, in ``blocks``, with several threads.
- ``single_file``: finds networks in other programs' checkpoints. ``sources``: the user's own files and folders.
  ``recognise``: names the model in a file that holds no network of Stable Cascade.
- ``published``: tables of the published repositories. ``download`` fetches these and other repositories from the ``hub``.
  ``manifest`` lists the downloaded files. ``build`` makes a model folder from a download and the user's own files.

The names of ``folder`` and ``writing`` can be imported from here. They are loaded on first use, because downloads need
neither torch nor transformers, which take seconds to import.
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
