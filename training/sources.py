"""Sources of training pictures: a folder of files, or a class that the configuration names.

A folder is read by `picture_folder.Pictures`. For any other path, ``[data] source`` names the class that reads it, as
``"module:Class"``. The class gets the path, and its options from ``[data]`` and ``[stage.data]``.
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
    """Captioned pictures, for training and held out.

    A class that ``[data] source`` names is constructed as ``Class(path, **options)``. The configuration is checked by the
    annotations of its options (`training.values`); options without a default are required in ``[data]``.
    """

    def check(self, record: Path) -> None:
        """Checks the data before anything is trained.

        Args:
            record: a file in the training's folder, in which the source may note what it has checked.

        Raises:
            TrainingError: the data are missing or damaged.
        """

    def captions(self) -> list[str]:
        """Captions from which the tokenizer learns."""

    def dataset(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, size: Size, device: torch.device) -> Dataset:
        """The pictures of one split; ``size`` is their default (height, width)."""


def check_path(path: Path) -> None:
    """Checks that ``--data`` exists.

    Raises:
        TrainingError: it does not.
    """
    if not path.exists():
        raise TrainingError(
            f"There is no {path}; --data must be a folder of captioned pictures, or a path that [data] source reads."
        )


def find_source(name: str) -> type:
    """The class that ``"module:Class"`` names.

    Raises:
        TrainingError: it cannot be imported.
    """
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"[data] source is {name!r}; it must be module:Class and importable: {summary(error)}."
        ) from error
    if not isinstance(found, type):
        raise TrainingError(f"[data] source is {name!r}; it must be module:Class, and this is not a class.")
    return found


def options_of(source: type) -> Kinds:
    """The options of a source: the arguments of its class after the path."""
    (_, *options) = kinds_of(source).items()
    return dict(options)


def make_source(name: str, path: Path, options: Mapping[str, Any]) -> Source:
    """Constructs the source ``name`` for ``path``, with those of ``options`` that it takes.

    Raises:
        TrainingError: it cannot be imported, or an option is missing.
    """
    source = find_source(name)
    kinds = options_of(source)
    for option, (_, needed) in kinds.items():
        if needed and option not in options:
            raise TrainingError(f"[data] lacks {option}, which {name} needs for {path}.")
    return source(path, **{option: options[option] for option in kinds if option in options})
