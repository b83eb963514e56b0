"""Merges adapters into the weights of a loaded model.

Weights become base + the sum of strength * (trained - base), computed in float32 and rounded once; to 8 bits where they are
kept so. They are written in place, where CUDA graphs and fused layers read them; for networks that are on the host, into host
memory. Only tensors whose adapters change are written. Each is computed from the base weight, which is read again. So errors
do not add up, and without adapters the weights equal the base weights exactly.

The adapters of each tensor are recorded when it is written. If a request ends in the middle of a change, some tensors have
the old adapters and some the new ones; the next request changes every tensor whose adapters are not that request's.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cascade.limits import InputError
from cascade.loras.lora import Lora
from cascade.loras.selection import Chosen, Key, Library, Selection, word_vectors
from cascade.loras.words import Words, distinct
from cascade.networks.eight_bits import EightBits, in_float, scale_of
from cascade.networks.layout import SCALE, published_names
from cascade.networks.precisions import FORMS
from cascade.running.runner import Runner
from cascade.weights.base import BaseWeights, KeptWeights, Stored
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora import NETWORKS, Change, Placed, merged
from cascade.weights.lora.words import TABLE

logger = logging.getLogger(__name__)

# The adapters in a tensor, each with its strength. While a tensor is being written, its record equals that of no selection.
Recipe = tuple[tuple[Key, float], ...]
BEING_WRITTEN: Recipe = (((), float("nan")),)


class _Place(NamedTuple):
    """The parameter that holds a published tensor, and its rows there."""

    parameter: str
    rows: slice


class Loras:
    """Sets adapters in a model's networks.

    Args:
        networks: "prior", "decoder" and "text_encoder".
        vocabulary: returns the tokenizer's words and their rows.
        runner: runs the networks.
        base: reads the base weights; None: copies of the weights that change are kept.
        folder: has the adapters that requests call by name; None: there is none.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        vocabulary: Callable[[], Mapping[str, int]],
        runner: Runner,
        base: BaseWeights | None = None,
        folder: Path | None = None,
    ) -> None:
        self.networks = {name: networks[name] for name in NETWORKS}
        self.vocabulary = vocabulary
        self.runner = runner
        self.base = KeptWeights() if base is None else base
        self.folder = folder
        self._recipes: dict[str, dict[str, Recipe]] = {name: {} for name in self.networks}
        # None: a change has begun and not ended.
        self._applied: Selection | None = Selection()

    def select(self, loras: Sequence[Lora]) -> Selection:
        """Read the adapters of a request, unless they are in the weights already. Changes no weight.

        Raises:
            InputError: an adapter is missing, damaged or does not fit this model.
        """
        if not loras:
            return self._applied if self._applied is not None and not self._applied.chosen else Selection()
        chosen = []
        for place, lora in enumerate(loras):
            with _named(place, lora):
                path = self._library.find(Path(lora.path))
                chosen.append(Chosen(path, self._library.key(path), lora.scale))
        keys = tuple((one.key, one.scale) for one in chosen if one.scale)
        if self._applied is not None and keys == self._applied.keys:
            return self._applied
        selection, words, placed = Selection(tuple(one for one in chosen if one.scale)), [], []
        for place, one in enumerate(chosen):
            with _named(place, loras[place]):
                found = self._library.read(one.path)  # at scale 0 too, so that errors in it are reported
                if one.scale:
                    placed.append(found)
                    words += self._words_of(found)
        selection.placed, selection.words = placed, Words(distinct(words))
        if words:
            logger.info("Words that the prompt may use: %s.", shortened(", ".join(selection.words.names), 300))
        return selection

    def apply(self, selection: Selection) -> None:
        """Write a selection into the weights. Returns at once if it is there already.

        Raises:
            WeightsError: the base weights, or adapters that another request has replaced, can no longer be read.
        """
        if selection is self._applied:
            return
        self._applied = None
        start = time.perf_counter()
        if selection.placed is None:
            selection.placed = [self._library.read(one.path) for one in selection.chosen]
        count = self.runner.with_room(lambda: sum(self._apply(name, selection) for name in self.networks))
        selection.placed = None  # up to gigabytes
        self._applied = selection
        if count:
            logger.info("LoRAs: %d tensors changed in %.2f s.", count, time.perf_counter() - start)

    @cached_property
    def _shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        return {
            name: {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
            for name, network in self.networks.items()
        }

    @cached_property
    def _library(self) -> Library:
        weights = {
            name: {key: shape for key, shape in shapes.items() if not key.endswith(SCALE)}
            for name, shapes in self._shapes.items()
        }
        return Library(self.folder, weights, self.vocabulary)

    @cached_property
    def _places(self) -> dict[str, Mapping[str, _Place]]:
        return {name: _places(network, self._shapes[name]) for name, network in self.networks.items()}

    @torch.no_grad()
    def _apply(self, name: str, selection: Selection) -> int:
        """Change one network. Returns how many tensors have changed."""
        changes: dict[str, list[tuple[Change, float]]] = {}
        recipes: dict[str, Recipe] = {}
        for one, placed in zip(selection.chosen, selection.placed or (), strict=True):
            for key, several in placed.changes.get(name, {}).items():
                changes.setdefault(key, []).extend((change, one.scale) for change in several)
                recipes[key] = (*recipes.get(key, ()), (one.key, one.scale))
        noted = self._recipes[name]
        stale = [key for key in {**noted, **recipes} if noted.get(key, ()) != recipes.get(key, ())]
        if not stale:
            return 0
        places = self._places[name]
        with self.runner.editing(name, self.networks[name]) as tensors:

            def at(key: str) -> Tensor:
                return tensors[places[key].parameter][places[key].rows]

            def current(key: str) -> Stored:
                scale = scale_of(key)
                return EightBits(at(key), at(scale)) if scale in places else at(key)

            for key, base in self.base.read(name, stale, self.runner.device, current):
                noted[key] = BEING_WRITTEN
                weight = merged(in_float(base), changes[key]) if key in changes else base
                _write(weight, current(key))
                noted[key] = recipes.get(key, ())
        for key in stale:
            if not noted[key]:
                del noted[key]
        return len(stale)

    def _words_of(self, placed: Placed) -> list[tuple[str, Tensor]]:
        return word_vectors(placed, self._table() if any(word.begins_from for word in placed.words) else None)

    def _table(self) -> Tensor:
        """The words of the text encoder as they were loaded, on the CPU."""
        name, cpu = "text_encoder", torch.device("cpu")
        with self.runner.editing(name, self.networks[name]) as tensors:
            ((_, table),) = self.base.read(name, [TABLE], cpu, lambda key: tensors[key])
        return table


def _write(weight: Stored, target: Stored) -> None:
    """Write a weight in the form of `target`. Weights that have this form already are kept exactly."""
    if isinstance(target, EightBits):
        form = target.weight.dtype
        if not isinstance(weight, EightBits) or weight.weight.dtype != form:
            weight = FORMS[form].quantise(in_float(weight))
        for one, place in zip(weight, target, strict=True):
            _write(one, place)
        return
    if isinstance(weight, EightBits):
        weight = weight.restored(target.dtype)
    # For other tensors, torch first makes a copy on the host. It must be complete before it is read.
    target.copy_(weight.to(target.dtype), non_blocking=target.is_contiguous())


def _places(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> dict[str, _Place]:
    """The place of each published tensor."""
    places: dict[str, _Place] = {}
    for parameter, names in published_names(network).items():
        first = 0
        for name in names:
            last = first + shapes[name][0] if len(names) > 1 else None
            places[name] = _Place(parameter, slice(first, last))
            first = last or 0
    return places


@contextlib.contextmanager
def _named(place: int, lora: Lora) -> Iterator[None]:
    """The error of an adapter, as an error about the request's input."""
    try:
        yield
    except WeightsError as error:
        raise InputError(f"loras[{place}]: {error}") from error
    except OSError as error:
        raise InputError(
            f"loras[{place}]: {shortened(lora.path, 100)} cannot be read: {error.strerror or shortened(error)}."
        ) from error
