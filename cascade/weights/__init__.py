"""Weights: download, check, convert and load them.

- ``components``: their names and classes. ``making`` makes one from its files. ``settings``: the sampler's defaults.
  ``fitting``: whether tensors fit a network. ``agreement``: whether components fit each other.
- ``folder``: opens model folders and loads their components. ``writing`` writes model folders.
- ``reading``: reads safetensors files. ``sums``: checksums of their pieces, compared during reading. ``hashing``: sha256.
  ``locking``: a lock that one process at a time holds.
- ``base``: reads weights of a loaded network again, in ``blocks``, with several threads.
- ``variants``: the configurations of the published networks. ``single_file``: finds networks in other programs' checkpoints.
  ``sources``: the user's own files and folders.
  ``recognise``: names the model in a file that holds no network of Stable Cascade.
- ``published``: tables of the published repositories. ``download`` fetches these and other repositories from the ``hub``.
  ``manifest`` lists the downloaded files, and ``downloaded`` checks them. ``build`` makes a model folder from a download and
  the user's own files.

The names in `EXPORTED` can be imported from here. They are loaded on first use, because downloads do not need torch,
which takes seconds to import.
"""

from importlib import import_module
from typing import Any

# Names by the module that has them.
EXPORTED = {
    "components": (
        "COMPONENTS",
        "CONTROLNETS",
        "DISTILLED",
        "NEEDED",
        "NETWORKS",
        "PROCESSORS",
        "TURBO",
    ),
    "errors": ("WeightsError",),
    "folder": ("ModelFolder",),
    "settings": ("PUBLISHED_SAMPLER", "StageSettings"),
    "writing": ("replacement", "save_component", "save_model_folder", "write_model_json"),
}


def __getattr__(name: str) -> Any:
    for module, names in EXPORTED.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
