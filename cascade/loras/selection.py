"""Finds the adapters of a request, reads them, and assigns their tensors to this model's networks."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cascade.loras.words import Words
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora import Adapter, Placed, place
from cascade.weights.names import SUFFIX

logger = logging.getLogger(__name__)

# Identifies an adapter: the paths of its files, and when each was changed.
Key = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Chosen:
    """One adapter of a request.

    Attributes:
        path: its file or folder.
        key: the same for the same files.
        scale: its strength.
    """

    path: Path
    key: Key
    scale: float


@dataclass(eq=False)
class Selection:
    """The adapters of a request.

    Attributes:
        chosen: in the request's order, without those at scale 0.
        words: that prompts may use.
        placed: their changes, in the same order; None: the weights have them already.
    """

    chosen: tuple[Chosen, ...] = ()
    words: Words = field(default_factory=Words)
    placed: list[Placed] | None = None

    @property
    def keys(self) -> tuple[tuple[Key, float], ...]:
        """Equal for two selections that give the same weights."""
        return tuple((one.key, one.scale) for one in self.chosen)


class Library:
    """Finds adapters and reads them.

    Args:
        folder: has the adapters that requests call by name; None: there is none.
        shapes: of this model's networks, see `cascade.weights.lora.place`.
        vocabulary: returns the tokenizer's words and their rows.
    """

    def __init__(
        self,
        folder: Path | None,
        shapes: Mapping[str, Mapping[str, Sequence[int]]],
        vocabulary: Callable[[], Mapping[str, int]],
    ) -> None:
        self.folder = folder
        self.shapes = shapes
        self.vocabulary = vocabulary

    def find(self, path: Path) -> Path:
        """The path of an adapter, which is given as a path, or as a name in the folder.

        Raises:
            WeightsError: there is none.
        """
        if path.exists():
            return path if path.name else path.resolve()  # settings are found by the name, and "." has none
        if self.folder is not None and len(path.parts) == 1 and path.name not in (".", ".."):
            for name in (path.name, f"{path.name}{SUFFIX}"):
                if (self.folder / name).exists():
                    return self.folder / name
        names = self.names()
        there = f"; {self.folder} has {', '.join(names[:20])}" if names else ""
        raise WeightsError(f"There is no file or folder {shortened(path, 100)}{there}.")

    def names(self) -> list[str]:
        """The names of the adapters in the folder, sorted."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(
            path.name.removesuffix(SUFFIX)
            for path in self.folder.iterdir()
            if not path.name.endswith(".json") and path.name[0] != "."
        )

    def key(self, path: Path) -> Key:
        """Identifies the adapter; changes when its files change."""
        return tuple(sorted(_states(path, self._settings(path))))

    def read(self, path: Path) -> Placed:
        """Read an adapter for this model's networks. Logs what it is, by its file's name alone: users read that log.

        Raises:
            WeightsError: it cannot be read, or does not fit.
        """
        adapter = Adapter.read(path, self._settings(path))
        placed = place(adapter, self.shapes, None if adapter.rows is None else self.vocabulary())
        logger.info("%s: %s; %s.", path.name, placed.adapter.format, shortened(placed.summary, 400))
        for word in placed.words:
            if word.outputs is not None:
                logger.warning("%s: what %s adds to the text encoder's output is not used.", path.name, word.name)
        return placed

    def _settings(self, path: Path) -> list[Path]:
        """The files that may have the settings that the authors' files lack."""
        return [] if self.folder is None else [self.folder / f"{path.name.removesuffix(SUFFIX)}.json"]


def _states(path: Path, settings: Sequence[Path]) -> Iterator[tuple[str, int, int, int, int]]:
    beside = [path.with_suffix(".json"), path.parent / "adapter_config.json", *settings] if path.name else []
    inside = [one for pattern in ("*", "*/*") for one in path.glob(pattern)] if path.is_dir() else []
    for one in {path, *beside, *inside}:
        if one == path or one.is_file():
            found = one.stat()
            yield str(one.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def word_vectors(placed: Placed, table: Tensor | None) -> list[tuple[str, Tensor]]:
    """The words of an adapter, float32 (n, D) on the CPU.

    table: the text encoder's word embeddings, on the CPU; needed if words were trained from known ones.
    """
    return [(word.name, word.vectors if table is None else word.rows(table)) for word in placed.words]
