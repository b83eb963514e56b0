"""`Lora`, an adapter as a request names it. Reads no file."""

import os
from dataclasses import dataclass
from pathlib import Path

from cascade.limits import InputError, Limits, shown

SCALE = Limits(float, 1.0, low=-2, high=3)


@dataclass(frozen=True)
class Lora:
    """An adapter, such as a LoRA, and its strength.

    Attributes:
        path: of a safetensors file, a PEFT folder, a tar or a zip; or the name of one in the model folder's `loras`, with or
            without ".safetensors".
        scale: -2 to 3. The weights are base + scale * (trained - base). It does not scale the words that the adapter brings:
            they are used in full, or at 0 not at all.

    Raises:
        InputError: the scale is not from -2 to 3, or the path is not a path.
    """

    path: str | os.PathLike[str]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike) or not os.fspath(self.path) or "\0" in os.fspath(self.path):
            raise InputError(f"path of a Lora is {shown(self.path)}; it must be the path of a file.")
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "scale", SCALE.check("scale of a Lora", self.scale))
