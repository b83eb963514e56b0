"""PEFT's configuration beside the tensors: rank and alpha, by layer."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora.patterns import matching

# Kinds that are read, and each one's name for alpha.
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
KINDS = (*ALPHAS, "OFT", "IA3")
# diffusers' key in a file's metadata; its text has one configuration per network.
METADATA = "lora_adapter_metadata"


def from_metadata(metadata: Mapping[str, str], where: object) -> dict[str, dict[str, Any]]:
    """The configurations that diffusers has put into a file, by the prefix of their network; {} if there are none.

    Raises:
        WeightsError: the metadata is damaged.
    """
    if METADATA not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA])
        configs: dict[str, dict[str, Any]] = {}
        for key, value in content.items():
            network, _, name = key.partition(".")
            configs.setdefault(f"{network}.", {"peft_type": "LORA"})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{where}: its metadata {METADATA} is damaged: {shortened(error).rstrip('.')}.") from error
    return configs


def is_of_text(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration is for a text encoder; None: it does not say."""
    mapping = config.get("auto_mapping")
    base = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return base.startswith("CLIPText") if isinstance(base, str) else None


def scales(config: Mapping[str, Any], layers: Sequence[str], where: object) -> dict[str, float]:
    """The scale of each layer, for `algorithms`.

    Args:
        config: PEFT's.
        layers: as the file spells them.
        where: the source of the configuration, for errors.

    Raises:
        WeightsError: the kind is not read, or a value is damaged.
    """
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise WeightsError(f"{where}: peft_type is {shortened(repr(kind), 40)}; only {', '.join(KINDS)} can be read.")
    if kind == "IA3":
        inputs = _feedforward(config, layers, where)
        return {name: 0.0 if name in inputs else 1.0 for name in layers}
    if kind == "OFT":
        neumann = config.get("use_cayley_neumann", True)
        terms = _number(config, "num_cayley_neumann_terms", where, 5.0)
        return dict.fromkeys(layers, min(terms, 64.0) if neumann else 0.0)
    alpha, rank = _number(config, ALPHAS[kind], where), _number(config, "r", where)
    alphas = dict.fromkeys(layers, alpha) | _by_pattern(config, "alpha_pattern", layers, where)
    ranks = dict.fromkeys(layers, rank) | _by_pattern(config, "rank_pattern", layers, where)
    root = kind == "LORA" and bool(config.get("use_rslora"))
    return {name: alphas[name] / (math.sqrt(ranks[name]) if root else ranks[name]) for name in layers}


def _feedforward(config: Mapping[str, Any], layers: Sequence[str], where: object) -> set[str]:
    """The layers whose inputs IA3 multiplies, not their outputs."""
    names = config.get("feedforward_modules") or []
    if isinstance(names, str):
        return set(matching(names, layers, where, whole=True))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{where}: feedforward_modules is {shortened(repr(names), 40)}; it must be a list of names.")
    return {layer for layer in layers if layer.endswith(tuple(names))}


def _by_pattern(config: Mapping[str, Any], name: str, layers: Sequence[str], where: object) -> dict[str, float]:
    """The values of the layers that a pattern names. If several patterns match, the first one is used."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, Mapping):
        raise WeightsError(f"{where}: {name} is {shortened(repr(patterns), 40)}; it must be an object.")
    found: dict[str, float] = {}
    for pattern in patterns:
        value = _number(patterns, pattern, f"{where}: {name}")
        for layer in matching(pattern, layers, where, whole=True):
            found.setdefault(layer, value)
    return found


def _number(config: Mapping[str, Any], name: str, where: object, default: float | None = None) -> float:
    """A positive number of a configuration. An alpha of 0 would turn the adapter off."""
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise WeightsError(
            f"{where}: {shortened(name, 60)} is {shortened(repr(value), 40)}; it must be a positive number."
        )
    return float(value)
