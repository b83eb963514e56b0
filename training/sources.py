"""Where training pictures come from: a folder of files, or a class of one's own that the configuration names.

A folder needs no source: `picture_folder.Pictures` reads it. Whatever else ``--data`` is, ``[data] source`` names the class
that reads it, as ``"module:Class"``. The class is given the path, and its options from ``[data]`` and ``[stage.data]``.
"""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from cascade.sizes import Size
from training.dataset import Dataset, Split
from training.errors import TrainingError, summary
from training.values import Kinds, kinds_of


class Source(Protocol):
    """Pictures with captions, for training and held out.

    A class that ``[data] source`` names is made as ``Class(path, **options)``. The annotations of its options are what the
    configuration is checked by (`training.values`); those without a default must be in ``[data]``.
    """

    def check(self, record: Path) -> None:
        """Looks for faults before anything is trained.

        Args:
            record: a file in the training's folder that may note what was found whole.

        Raises:
            TrainingError: the data are missing or damaged.
        """

    def captions(self) -> list[str]:
        """Captions for the tokenizer to learn from."""

    def dataset(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, size: Size, device: torch.device) -> Dataset:
        """The pictures of one split, of ``size`` (height, width) unless others are asked for."""


def find_source(name: str) -> type:
    """The class that ``"module:Class"`` names.

    Raises:
        TrainingError: it cannot be imported.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"[data] source is {name!r}; it must be module:Class, and can be imported: {summary(error)}."
        ) from error
    if not isinstance(found, type):
        raise TrainingError(f"[data] source is {name!r}; it must be module:Class, and name a class.")
    return found


def options_of(source: type) -> Kinds:
    """What ``[data]`` may hold for a source: the arguments that its class takes after the path."""
    (_, *options) = kinds_of(source).items()
    return dict(options)


def make_source(name: str, path: Path, options: Mapping[str, Any]) -> Source:
    """The source ``name`` for ``path``; of ``options``, it is given those that it takes.

    Raises:
        TrainingError: it cannot be imported, or an option is missing.
    """
    source = find_source(name)
    kinds = options_of(source)
    for option, (_, needed) in kinds.items():
        if needed and option not in options:
            raise TrainingError(f"[data] lacks {option}, which {name} needs for {path}.")
    return source(path, **{option: options[option] for option in kinds if option in options})
