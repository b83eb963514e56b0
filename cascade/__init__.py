"""Stable Cascade: text, images or both in, images out, in three stages.

Stage C makes semantic latents, Stage B decoder latents of them, Stage A pixels.

    from cascade import Cascade, Request

    (image,) = Cascade.load("weights/mini").generate(Request("a red apple on a green background"))

The names in `__all__` are the interface. They are imported when first used: downloads do not need torch, which takes seconds
to import.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["Cascade", "Control", "Lora", "Progress", "Request", "__version__"]

if TYPE_CHECKING:
    from cascade.guides.controls import Control
    from cascade.loras.lora import Lora
    from cascade.pipeline import Cascade
    from cascade.progress import Progress
    from cascade.request import Request
else:  # hidden from type checkers, which would take any name for an attribute

    def __getattr__(name: str) -> object:
        from importlib import import_module

        modules = {
            "Cascade": "pipeline",
            "Control": "guides.controls",
            "Lora": "loras.lora",
            "Progress": "progress",
            "Request": "request",
        }
        if name not in modules:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{modules[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
