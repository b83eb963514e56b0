"""A server's settings, read from environment variables."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from serving.image_urls import UrlSettings
from serving.loras import LoraSettings
from serving.metadata import Detail

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
        weights: the model folder.
        device, dtype, memory: see `Cascade.load`; "auto" chooses by the machine.
        metadata: how much of a request is written into picture files and logs.
        urls: limits for image URLs.
        loras: how LoRAs are downloaded.
    """

    weights: Path
    device: str
    dtype: str
    memory: str
    metadata: Detail
    urls: UrlSettings
    loras: LoraSettings = field(default_factory=LoraSettings.from_environment)

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read CASCADE_WEIGHTS, _DEVICE, _DTYPE, _MEMORY and _METADATA, and those of `UrlSettings` and `LoraSettings`.

        Raises:
            ValueError: a variable has a value that is not allowed. Device, dtype and memory are checked when a model loads.
        """
        names = ("device", "dtype", "memory")
        return cls(
            weights=find_weights(),
            metadata=Detail.from_environment(),
            urls=UrlSettings.from_environment(),
            loras=LoraSettings.from_environment(),
            **{name: os.environ.get(f"CASCADE_{name.upper()}") or "auto" for name in names},
        )


def find_weights() -> Path:
    """The folder named by CASCADE_WEIGHTS, else the published model if it was downloaded, else the miniature."""
    if os.environ.get("CASCADE_WEIGHTS"):
        return Path(os.environ["CASCADE_WEIGHTS"])
    published = WEIGHTS / "stable-cascade"
    return published if published.is_dir() else WEIGHTS / "mini"
