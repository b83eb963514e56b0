"""Which of Stable Cascade's networks a file holds whole, where an adapter was wanted: for the sentence that refuses it."""

from collections.abc import Iterable

from cascade.weights.recognise import recognise
from cascade.weights.variants import SIGNATURES, TITLES


def whole_networks(keys: Iterable[str]) -> list[str]:
    """The components of which a file has all weights, by a tensor that no adapter has; empty for an adapter.

    Args:
        keys: of the file's tensors.
    """
    keys = list(keys)
    if recognise(dict.fromkeys(keys, ())) == "a LoRA":  # some bring whole layers with them
        return []
    found = {
        component: None
        for key in keys
        for signature, component in SIGNATURES.items()
        if key == signature or key.endswith(f".{signature}")
    }
    return list(found)


def clause(components: Iterable[str]) -> str:
    """The clause for errors about a file with these components: what it is, and the command that uses it."""
    components = list(components)
    titles = " and ".join(TITLES[one] for one in components)
    options = " ".join(f"--{one.replace('_', '-')} FILE" for one in components)
    return f"is not an adapter but holds {titles} whole; scripts/save-weights {options} makes a model folder with it"
