"""Adapters of the authors' own training: numbered weights, and learned words by their rows in the table of words.

The files name neither the layers nor the words. These are in the settings of the training, `module_filters` and
`train_tokens` (train/train_c_lora.py), which a JSON file beside the adapter repeats.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora.layers import Authored, Shapes, authored
from cascade.weights.lora.patterns import matching

NUMBERED = re.compile(r"weights\.(\d{1,5})\.lora_(down|up)")
# The metadata key under which converted files have their settings.
METADATA = "training_settings"
VECTORS, INDICES = "embeddings.embeddings", "embeddings.indices"
# The filter of the published example of training; it is tried for a file without settings.
USUAL = (".attn",)


class Settings(NamedTuple):
    """The settings that the file lacks.

    Attributes:
        module_filters: parts of names; a module that has any of them is adapted.
        train_tokens: names of words, each with a regular expression for the known words whose mean it begins from, or None.
            A name in [] or <> is a new word; any other name is a regular expression for existing words.
        where: the source of the settings, for errors.
    """

    module_filters: tuple[str, ...]
    train_tokens: tuple[tuple[str, str | None], ...]
    where: str

    @property
    def new_words(self) -> tuple[tuple[str, str | None], ...]:
        """The words that are added to the vocabulary, in the order of their rows."""
        return tuple(one for one in self.train_tokens if is_new(one[0]))


def is_new(name: str) -> bool:
    return (name[0], name[-1]) in (("[", "]"), ("<", ">"))


def settings_of(content: Mapping[str, Any], where: str) -> Settings | None:
    """The settings in a JSON object; None if it has none.

    Raises:
        WeightsError: they are damaged.
    """
    if not {"module_filters", "train_tokens"} & set(content):
        return None
    filters, tokens = content.get("module_filters"), content.get("train_tokens")
    filters = list(USUAL) if filters is None else filters
    if not isinstance(filters, list) or not all(isinstance(one, str) for one in filters):
        raise WeightsError(f"{where}: module_filters is {shortened(repr(filters), 60)}; it must be a list of texts.")
    pairs = []
    for one in _listed(tokens or [], where):
        name, begins_from = one if isinstance(one, list) and len(one) == 2 else (one, None)
        if not isinstance(name, str) or not name.strip() or not (begins_from is None or isinstance(begins_from, str)):
            raise WeightsError(
                f"{where}: train_tokens has {shortened(repr(one), 60)}; each must be [name, regular expression or null]."
            )
        pairs.append((name, begins_from))
    return Settings(tuple(filters), tuple(pairs), where)


def _listed(tokens: object, where: str) -> list[Any]:
    if not isinstance(tokens, list):
        raise WeightsError(f"{where}: train_tokens is {shortened(repr(tokens), 60)}; it must be a list.")
    return tokens


def numbered(keys: Sequence[str]) -> dict[int, dict[str, str]]:
    """The keys of numbered factors: by number, those of "down" and "up"."""
    found: dict[int, dict[str, str]] = {}
    for key in keys:
        match = NUMBERED.fullmatch(key)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = key
    return found


def modules(shapes: Shapes, filters: Sequence[str]) -> list[Authored]:
    """The weights of Stage C that these filters choose, in order."""
    return [one for one in authored(shapes) if any(part in one.module for part in filters)]


def agree(chosen: Sequence[Authored], factors: Mapping[int, Mapping[str, Tensor]]) -> bool:
    """Whether the shapes of numbered factors fit these weights."""
    if sorted(factors) != list(range(len(chosen))):
        return False
    for i, one in enumerate(chosen):
        pair = factors[i]
        if set(pair) != {"down", "up"} or any(tensor.ndim != 2 for tensor in pair.values()):
            return False
        if pair["up"].shape != (one.shape[0], len(pair["down"])) or pair["down"].shape[1] != one.shape[1]:
            return False
    return True


def attention_widths(factors: Mapping[int, Mapping[str, Tensor]]) -> set[int]:
    """The widths of attention blocks, if the factors are those of attention alone: of each block the output, then q, k and v
    in one."""
    widths = set()
    for i, pair in factors.items():
        if set(pair) != {"down", "up"} or any(tensor.ndim != 2 for tensor in pair.values()):
            return set()
        width, times = pair["down"].shape[1], 3 if i % 2 else 1
        if len(pair["up"]) != times * width:
            return set()
        widths.add(width)
    return widths


def rows_of(name: str, vocabulary: Mapping[str, int], where: str) -> list[int]:
    """The rows of the words that a regular expression finds in the vocabulary."""
    return sorted(vocabulary[word] for word in matching(name, vocabulary, where))
