"""Finds the tensors of a model's networks that an adapter changes. A tensor of the adapter that fits nowhere is an error."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.weights.lora import algorithms, authors
from cascade.weights.lora.adapter import OUTPUTS, VECTORS, Adapter, Group
from cascade.weights.lora.changes import KINDS, Change
from cascade.weights.lora.fitting import Changes, fitting, of_weights
from cascade.weights.lora.layers import Layers, Shapes
from cascade.weights.lora.refusal import refusal
from cascade.weights.lora.words import TABLE, Word, listed

logger = logging.getLogger(__name__)

# Networks that adapters change, in the order in which they are tried, and their names in messages.
NETWORKS = {"prior": "Stage C (prior)", "decoder": "Stage B (decoder)", "text_encoder": "the text encoder"}


def _of_all_channels(group: Group, shape: Sequence[int] | None) -> bool:
    """OneTrainer's LoRA of a depthwise convolution: a convolution of all channels into one, which is added to all of them. No
    change of the depthwise weight does that."""
    down, up = group.tensors.get("down"), group.tensors.get("up")
    if shape is None or len(shape) != 4 or shape[1] != 1 or down is None or up is None:
        return False
    return down.ndim == 4 and down.shape[1] == shape[0] != 1 and len(up) == 1


# Parts of adapters that have no use in these networks, and are ignored: the reason, and a test that recognises them. The
# shape is that of the layer's weight; None: there is no such layer.
MEANINGLESS: tuple[tuple[str, Callable[[Group, Sequence[int] | None], bool]], ...] = (
    ("of depthwise convolutions, trained as convolutions of all channels", _of_all_channels),
    (
        "of CLIP's logit_scale, which only training reads",
        lambda group, shape: group.place.layer.endswith("logit_scale"),
    ),
    ("of lists of positions, which are not weights", lambda group, shape: group.place.layer.endswith("position_ids")),
)


@dataclass(frozen=True, eq=False)
class Placed:
    """An adapter in the networks of one model.

    Attributes:
        adapter: the adapter.
        changes: by network, "prior", "decoder" or "text_encoder", then by the published name of the tensor.
        words: words for prompts.
        ignored: keys that have no use in these networks.
    """

    adapter: Adapter
    changes: Mapping[str, Changes]
    words: tuple[Word, ...]
    ignored: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One line for the log: how many tensors were placed, and in which networks."""
        parts = []
        for network, changes in self.changes.items():
            layers = {name.rpartition(".")[0] for name in changes}
            parts.append(f"{len(layers)} layer{'s' * (len(layers) != 1)} of {NETWORKS[network]}")
        if self.words:
            parts.append(f"words {listed(self.words)}")
        total = len(self.adapter.shapes)
        left_out = f", {len(self.ignored)} of no meaning here" if self.ignored else ""
        return f"{total - len(self.ignored)} of {total} tensors placed{left_out}: {', '.join(parts)}"


def place(adapter: Adapter, networks: Mapping[str, Shapes], vocabulary: Mapping[str, int] | None = None) -> Placed:
    """Find the place of every tensor of an adapter.

    Args:
        adapter: the adapter as read.
        networks: the shapes of the tensors of Stage C, Stage B and the text encoder, by published name, as in their state
            dicts; under "prior", "decoder" and "text_encoder". An adapter for a missing network is an error.
        vocabulary: the tokenizer's words, and the row of each in the table of words; needed by the authors' learned words.

    Raises:
        WeightsError: a tensor has no place, or there are none. The sentence names the format, how many tensors have a place,
            and the first one that has none; and the model that the adapter is for, if it is known.
    """
    known = {name: Layers(networks[name]) for name in NETWORKS if name in networks}
    found = _Finding(adapter, known)
    for group in adapter.groups:
        found.add(group)
    if adapter.numbered:
        _place_numbered(adapter, networks, found)
    words = _place_words(adapter, networks, vocabulary, found)
    found.unplaced += adapter.unread
    placed = found.result(words)
    if found.unplaced or not (placed.changes or placed.words):
        raise refusal(adapter, known.get("prior"), found.unplaced, len(placed.ignored))
    for reason, keys in found.ignored.items():
        logger.warning("%s: %d tensors %s, are left out: %s ...", adapter.path, len(keys), reason, keys[0])
    return placed


class _Finding:
    """The tensors that have a place so far."""

    def __init__(self, adapter: Adapter, known: Mapping[str, Layers]) -> None:
        self.adapter = adapter
        self.known = known
        self.changes: dict[str, Changes] = {}
        self.unplaced: list[str] = []
        self.ignored: dict[str, list[str]] = {}
        self._fits: dict[tuple[int, str], tuple[Changes, set[str]] | None] = {}
        # All groups that may belong to Stage B or C belong to one of them: to the one that more groups fit.
        self.unets = self._unets()

    def _unets(self) -> tuple[str, ...]:
        scores = {}
        for name in ("prior", "decoder"):
            groups = [group for group in self.adapter.groups if name in group.place.networks]
            if name not in self.known or not groups:
                continue
            scores[name] = sum(self._fitting(group, name) is not None for group in groups)
            if scores[name] == len(groups):
                return (name,)
        return tuple(sorted(scores, key=lambda name: -scores[name])[:1])

    def _fitting(self, group: Group, network: str) -> tuple[Changes, set[str]] | None:
        """A group's changes of a network, and which of its tensors are used; None if it does not fit."""
        key = id(group), network
        if key not in self._fits:
            self._fits[key] = fitting(group, self.known[network])
        return self._fits[key]

    def candidates(self, group: Group) -> list[str]:
        """The networks that a group may belong to, the likeliest first."""
        allowed = [name for name in group.place.networks if name in self.known]
        unets = [name for name in ("prior", "decoder") if name in allowed]
        rest = [name for name in allowed if name not in unets]
        return [*(name for name in unets if len(unets) == 1 or name in self.unets), *rest]

    def add(self, group: Group) -> None:
        candidates = self.candidates(group)
        for network in candidates:
            fits = self._fitting(group, network)
            if fits is not None:
                changes, used = fits
                for name, several in changes.items():
                    self.changes.setdefault(network, {}).setdefault(name, []).extend(several)
                self.unplaced += [key for name, key in group.keys.items() if name not in used]
                return
        for reason, means_nothing in MEANINGLESS:
            if any(means_nothing(group, self._weight(group, network)) for network in candidates):
                self.ignored.setdefault(reason, []).extend(group.keys.values())
                return
        self.unplaced += group.keys.values()

    def _weight(self, group: Group, network: str) -> Sequence[int] | None:
        layers = self.known[network].layer(group.place.layer)
        return self.known[network].shapes.get(f"{layers[0]}.weight") if len(layers) == 1 else None

    def result(self, words: tuple[Word, ...]) -> Placed:
        ignored = tuple(key for keys in self.ignored.values() for key in keys)
        changes = {name: self.changes[name] for name in NETWORKS if name in self.changes}
        return Placed(self.adapter, changes, words, ignored)


def _place_numbered(adapter: Adapter, networks: Mapping[str, Shapes], found: _Finding) -> None:
    """The authors' weights, by their numbers."""
    filters = authors.USUAL if adapter.settings is None else adapter.settings.module_filters
    chosen = authors.modules(networks["prior"], filters) if "prior" in networks else []
    keys = {i: [f"weights.{i}.lora_{name}" for name in pair] for i, pair in adapter.numbered.items()}
    if not authors.agree(chosen, adapter.numbered):
        found.unplaced += [key for i in sorted(keys) for key in keys[i]]
        return
    if adapter.settings is None:
        logger.info(
            "%s says nothing of its layers; by their shapes, they are those that the filter .attn chooses.",
            adapter.path,
        )
    (lora,) = (kind for kind in KINDS if kind.function is algorithms.lora)
    for i, one in enumerate(chosen):
        pair = adapter.numbered[i]
        changes = of_weights(lora, pair, 1 / len(pair["down"]), len(one.layers)) or []
        for layer, change in zip(one.layers, changes, strict=True):
            found.changes.setdefault("prior", {}).setdefault(f"{layer}.weight", []).append(change)


def _place_words(
    adapter: Adapter, networks: Mapping[str, Shapes], vocabulary: Mapping[str, int] | None, found: _Finding
) -> tuple[Word, ...]:
    table = tuple(networks.get("text_encoder", {}).get(TABLE, ()))
    words = []
    for name, kinds in adapter.words.items():
        vectors, outputs = kinds.get(VECTORS), kinds.get(OUTPUTS)
        vectors = vectors[None] if vectors is not None and vectors.ndim == 1 else vectors
        alike = outputs is None or (vectors is not None and outputs.shape == vectors.shape)
        fits = vectors is not None and len(table) == 2 and vectors.ndim == 2 and vectors.shape[1] == table[1]
        if not name.strip() or not fits or not alike:
            found.unplaced += [key for key in adapter.shapes if _is_of_word(key, name, kinds)]
            continue
        words.append(Word(name, _copied(vectors), None, None if outputs is None else _copied(outputs)))
    if adapter.rows is None:
        return tuple(words)
    learned = _place_rows(adapter, adapter.rows, table, vocabulary, found)
    if learned is None:
        found.unplaced += [authors.VECTORS, authors.INDICES]
        return tuple(words)
    return (*words, *learned)


def _copied(vectors: Tensor) -> Tensor:
    """In float32. Words outlive the file's memory, of which its tensors are parts."""
    return vectors.to(torch.float32, copy=True)


def _is_of_word(key: str, name: str, kinds: Mapping[str, Tensor]) -> bool:
    return any(key in (kind, f"bundle_emb.{name}.{kind}") for kind in kinds) or key == name


def _place_rows(
    adapter: Adapter,
    rows: tuple[Tensor, Tensor],
    table: Sequence[int],
    vocabulary: Mapping[str, int] | None,
    found: _Finding,
) -> list[Word] | None:
    """The authors' words, by their rows in the table of words; None if they fit no row."""
    vectors, indices = rows
    if len(table) != 2 or vectors.ndim != 2 or vectors.shape[1] != table[1] or indices.shape != vectors.shape[:1]:
        return None
    if not len(indices) or indices.is_floating_point() or min(indices) < 0 or vocabulary is None:
        return None
    size = len(vocabulary)
    new = sorted(int(index) for index in indices if index >= size)
    if adapter.settings is None:
        names: Sequence[tuple[str, str | None]] = [(f"[word{i + 1}]", None) for i in range(len(new))]
        where = ""
        if new:
            said = "does not say what its words are called nor what they begin from; they are called"
            logger.warning("%s %s %s.", adapter.path, said, ", ".join(name for name, _ in names))
    else:
        names, where = adapter.settings.new_words, adapter.settings.where
    # The n-th new word has the n-th row after the vocabulary's.
    if new != [size + i for i in range(len(new))] or len(names) < len(new):
        return None
    existing = indices < size
    if existing.any():
        tensors = {"indices": indices[existing].long(), "vectors": vectors[existing]}
        change = Change(algorithms.rows, tensors, whole=True)
        found.changes.setdefault("text_encoder", {}).setdefault(TABLE, []).append(change)
    words = []
    for index, (name, begins_from) in zip(new, names, strict=False):
        begins = () if begins_from is None else tuple(authors.rows_of(begins_from, vocabulary, where))
        words.append(Word(name, vectors[indices == index].float().sum(0, keepdim=True), begins))
    return words
