"""Why an adapter does not fit a model: the sentence that refuses it."""

from collections.abc import Sequence

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora import authors, foreign
from cascade.weights.lora.adapter import Adapter
from cascade.weights.lora.layers import Layers
from cascade.weights.lora.whole import clause, whole_networks

# The published Stage C of each width.
SIZES = {2048: "the full one", 1536: "the lite one"}
WIDTH = "down_blocks.0.0.depthwise.weight"


def refusal(adapter: Adapter, prior: Layers | None, unplaced: Sequence[str], ignored: int) -> WeightsError:
    """The error for an adapter that does not fit.

    Args:
        adapter: the adapter as read.
        prior: the model's Stage C; None: it has none.
        unplaced: keys of the adapter's tensors that have no place.
        ignored: how many tensors have no use in these networks.
    """
    if foreign.model(adapter.shapes) is None and (whole := whole_networks(adapter.shapes)):
        return WeightsError(f"{_shown(adapter)} {clause(whole)}.")
    total = len(adapter.shapes)
    first = shortened(unplaced[0], 100) if unplaced else None
    count = f"{total - ignored - len(unplaced)} of {total} tensors have a place"
    but = f", the first without is {first}" if first else ""
    return WeightsError(f"{_shown(adapter)} {_why(adapter, prior, unplaced)}: {count}{but}.")


def _shown(adapter: Adapter) -> str:
    return f"{shortened(adapter.path, 100)} ({adapter.format})"


def _why(adapter: Adapter, prior: Layers | None, unplaced: Sequence[str]) -> str:
    model = foreign.model(adapter.shapes)
    if model is not None:
        return f"is for {model}, not for Stable Cascade"
    width = None if prior is None or WIDTH not in prior.shapes else _width(adapter, prior)
    if width is not None:
        ours = prior.shapes[WIDTH][0]
        theirs = f"{width}, {SIZES[width]}" if width in SIZES else f"{width}"
        return f"is for a Stage C of the width {theirs}; this model's has {ours}"
    if adapter.numbered and any(key.startswith("weights.") for key in unplaced):
        if adapter.settings is None:
            return (
                "does not say which layers it is of, and its shapes are not those of .attn; give module_filters in a JSON file "
                "of its name beside it"
            )
        filters = shortened(", ".join(adapter.settings.module_filters), 60)
        return f"has other shapes than the layers that module_filters ({filters}) choose in this Stage C"
    if adapter.rows is not None and authors.VECTORS in unplaced:
        names = "train_tokens in a JSON file beside it" if adapter.settings is None else "its train_tokens"
        return f"has learned words that do not fit this model's vocabulary, or {names}"
    if not unplaced:
        return "holds nothing that changes this model"
    return "does not fit this model"


def _width(adapter: Adapter, prior: Layers) -> int | None:
    """The width of the Stage C that an adapter is for, if it differs from this model's."""
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
