"""A Cascade of the tiny networks of components.py, and a way to look at what is called."""

import copy

import pytest
from torch import nn

from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.pipeline import Cascade
from cascade.stages.text import TextEncoder
from cascade.weights import CONTROLNETS, StageSettings
from tests.components import copied

DEFAULTS = {
    "prior": StageSettings(steps=3, guidance=4.0, shift=2.0, rescale=0.7),
    "decoder": StageSettings(steps=2, guidance=1.1, shift=1.0, rescale=0.7),
}


def make_cascade(components: dict[str, object], make: type[Cascade] = Cascade, **options: object) -> Cascade:
    """A Cascade of copies, which may be changed."""
    parts = {
        name: copied(part) if isinstance(part, nn.Module) else copy.deepcopy(part) for name, part in components.items()
    }
    parts["controlnets"] = {
        name.removeprefix("controlnet_"): parts.pop(name) for name in CONTROLNETS if name in components
    }
    text = TextEncoder(parts.pop("tokenizer"), parts.pop("text_encoder"))
    parts["image_prompts"] = ImagePromptEncoder(parts.pop("feature_extractor"), parts.pop("image_encoder"))
    return make(text, **{**parts, "defaults": DEFAULTS, "native_size": 128, **options})


def count_calls(network: nn.Module, monkeypatch: pytest.MonkeyPatch, method: str = "forward") -> list[int]:
    """The batch size of every call of a method from now on; the method still does its work."""
    calls = []
    original = getattr(network, method)

    def counted(first: object, *args: object, **kwargs: object) -> object:
        calls.append(first.shape[0])
        return original(first, *args, **kwargs)

    monkeypatch.setattr(network, method, counted)
    return calls
