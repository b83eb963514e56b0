"""Finds the tensors of a model's networks that an adapter changes. A tensor of the adapter that fits nowhere is an error."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora import algorithms, authors, foreign
from cascade.weights.lora.adapter import OUTPUTS, VECTORS, Adapter, Group
from cascade.weights.lora.changes import KINDS, Change, Kind, change_of
from cascade.weights.lora.layers import Layers, Shapes
from cascade.weights.lora.whole import clause, whole_networks
from cascade.weights.lora.words import TABLE, Word, listed

logger = logging.getLogger(__name__)

# Networks that adapters change, in the order in which they are tried, and their names in messages.
NETWORKS = {"prior": "Stage C (prior)", "decoder": "Stage B (decoder)", "text_encoder": "the text encoder"}
# The published Stage C of each width.
SIZES = {2048: "the full one", 1536: "the lite one"}
WIDTH = "down_blocks.0.0.depthwise.weight"

Changes = dict[str, list[Change]]


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
        raise _misfit(found, networks)
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
            self._fits[key] = _fitting(group, self.known[network])
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
            fitting = self._fitting(group, network)
            if fitting is not None:
                changes, used = fitting
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


def _fitting(group: Group, network: Layers) -> tuple[Changes, set[str]] | None:
    layers = network.layer(group.place.layer)
    if not layers:
        tensor = network.tensor(group.place.layer)
        return None if tensor is None else _of_tensor(group, tensor, network)
    found: Changes = {}
    used: set[str] = set()
    kind = next(((kind, names) for kind in KINDS if (names := kind.names(group.tensors)) is not None), None)
    if kind is not None:
        weights = [f"{layer}.weight" for layer in layers]
        changes = _of_weights(kind[0], {name: group.tensors[name] for name in kind[1]}, group.scale, len(layers))
        if changes is None:
            return None
        for name, change in zip(weights, changes, strict=True):
            if not change.fits(network.shapes[name]):
                return None
            found.setdefault(name, []).append(change)
        used |= kind[1]
    for name, several in _of_biases(group, layers, found).items():
        if name in network.shapes and all(change.fits(network.shapes[name]) for _, change in several):
            found.setdefault(name, []).extend(change for _, change in several)
            used |= {part for part, _ in several}
    return (found, used) if found else None


def _of_tensor(group: Group, name: str, network: Layers) -> tuple[Changes, set[str]] | None:
    """ComfyUI's changes of whole tensors, such as biases, by their own names."""
    for kind in KINDS:
        names = kind.names(group.tensors)
        if names is not None and kind.function in (algorithms.difference, algorithms.replacement):
            changes = _of_weights(kind, {one: group.tensors[one] for one in names}, None, 1)
            return ({name: changes}, names) if changes and changes[0].fits(network.shapes[name]) else None
    return None


# Tensors with one row per output. They are split where q, k and v are one weight.
BY_OUTPUTS = ("up", "diff", "set")


def _of_weights(kind: Kind, tensors: Mapping[str, Tensor], scale: float | None, parts: int) -> list[Change] | None:
    """The change of a weight, or of each of the parts, q, k and v, that lie in it one below the other; None if the tensors
    cannot be such."""
    try:
        change = change_of(kind, tensors, scale)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError):  # alpha is not a number, or the rank is 0
        return None
    if parts == 1:
        return [change]
    stacked = [change.tensors[name] for name in BY_OUTPUTS if name in change.tensors]
    if change.magnitude is not None or any(one.ndim == 0 or len(one) % parts for one in stacked):
        return None
    pieces: list[dict[str, Tensor]] = [dict(change.tensors) for _ in range(parts)]
    for name in BY_OUTPUTS:
        if name in change.tensors:
            for piece, part in zip(pieces, change.tensors[name].chunk(parts), strict=True):
                piece[name] = part
    return [replace(change, tensors=piece) for piece in pieces]


def _of_biases(group: Group, layers: Sequence[str], weights: Changes) -> dict[str, list[tuple[str, Change]]]:
    """The changes of biases, each with the name of the part that it comes from."""
    found: dict[str, list[tuple[str, Change]]] = {}

    def add(part: str, function: Callable[..., Tensor], name: str, scale: float = 1.0) -> None:
        pieces = group.tensors[part].chunk(len(layers)) if group.tensors[part].ndim else ()
        for layer, piece in zip(layers, pieces, strict=False):
            found.setdefault(f"{layer}.bias", []).append((part, Change(function, {name: piece}, scale)))

    if "bias_diff" in group.tensors:
        add("bias_diff", algorithms.difference, "diff")
    if "bias_set" in group.tensors:
        add("bias_set", algorithms.replacement, "set")
    if "up_bias" in group.tensors:
        scales = [change.scale for several in weights.values() for change in several]
        add("up_bias", algorithms.difference, "diff", scales[0] if scales else 1.0)
    # PEFT's factors of outputs act on the bias, too.
    if "ia3_l" in group.tensors and group.scale:
        add("ia3_l", algorithms.ia3_factors, "ia3_l")
    return found


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
        changes = _of_weights(lora, pair, 1 / len(pair["down"]), len(one.layers)) or []
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


def _misfit(found: _Finding, networks: Mapping[str, Shapes]) -> WeightsError:
    """The error for an adapter that does not fit."""
    adapter = found.adapter
    if foreign.model(adapter.shapes) is None and (whole := whole_networks(adapter.shapes)):
        return WeightsError(f"{_shown(adapter)} {clause(whole)}.")
    total = len(adapter.shapes)
    ignored = sum(len(keys) for keys in found.ignored.values())
    first = shortened(found.unplaced[0], 100) if found.unplaced else None
    count = f"{total - ignored - len(found.unplaced)} of {total} tensors have a place"
    but = f", the first without is {first}" if first else ""
    return WeightsError(f"{_shown(adapter)} {_why(found, networks)}: {count}{but}.")


def _shown(adapter: Adapter) -> str:
    return f"{shortened(adapter.path, 100)} ({adapter.format})"


def _why(found: _Finding, networks: Mapping[str, Shapes]) -> str:
    adapter = found.adapter
    model = foreign.model(adapter.shapes)
    if model is not None:
        return f"is for {model}, not for Stable Cascade"
    width = _width(adapter, found.known)
    if width is not None and "prior" in networks and WIDTH in networks["prior"]:
        ours = networks["prior"][WIDTH][0]
        theirs = f"{width}, {SIZES[width]}" if width in SIZES else f"{width}"
        return f"is for a Stage C of the width {theirs}; this model's has {ours}"
    if adapter.numbered and any(key.startswith("weights.") for key in found.unplaced):
        if adapter.settings is None:
            return (
                "does not say which layers it is of, and its shapes are not those of .attn; give module_filters in a JSON file "
                "of its name beside it"
            )
        filters = shortened(", ".join(adapter.settings.module_filters), 60)
        return f"has other shapes than the layers that module_filters ({filters}) choose in this Stage C"
    if adapter.rows is not None and authors.VECTORS in found.unplaced:
        names = "train_tokens in a JSON file beside it" if adapter.settings is None else "its train_tokens"
        return f"has learned words that do not fit this model's vocabulary, or {names}"
    if not found.unplaced:
        return "holds nothing that changes this model"
    return "does not fit this model"


def _width(adapter: Adapter, known: Mapping[str, Layers]) -> int | None:
    """The width of the Stage C that an adapter is for, if it differs from this model's."""
    prior = known.get("prior")
    if prior is None or WIDTH not in prior.shapes:
        return None
    ours = prior.shapes[WIDTH][0]
    widths = set()
    for group in adapter.groups:
        down = group.tensors.get("down")
        # All sizes have the first attention block of the finest level, and its inputs are as wide as the level.
        is_query = any(
            layer.startswith("down_blocks.0.") and layer.endswith("to_q") for layer in prior.layer(group.place.layer)
        )
        if is_query and down is not None and down.ndim == 2:
            widths.add(down.shape[1])
    if adapter.settings is None:
        widths |= authors.attention_widths(adapter.numbered)
    return widths.pop() if len(widths) == 1 and ours not in widths else None
