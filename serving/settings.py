"""A server's settings, read from environment variables."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from serving.early import find_weights
from serving.image_urls import UrlSettings
from serving.loras import LoraSettings
from serving.metadata import Detail


@dataclass(frozen=True)
class Settings:
    """The settings of a server.

    Attributes:
        weights: the model folder.
        device, dtype, memory: see `Cascade.load`; "auto" chooses by the machine.
        precision: see `Cascade.load`; "auto" is how the weights are stored.
        metadata: how much of a request is written into picture files and logs.
        urls: limits for image URLs.
        loras: how LoRAs are downloaded.
        download: which weights are fetched if they are missing, see `serving.fetching`; empty: none.
    """

    weights: Path
    device: str
    dtype: str
    memory: str
    metadata: Detail
    urls: UrlSettings
    loras: LoraSettings = field(default_factory=LoraSettings.from_environment)
    download: str = ""
    precision: str = "auto"

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read CASCADE_WEIGHTS, _DOWNLOAD, _DEVICE, _DTYPE, _MEMORY, _PRECISION and _METADATA, and those of `UrlSettings`
        and `LoraSettings`.

        Raises:
            ValueError: a variable has a value that is not allowed. What `Cascade.load` gets is checked there.
        """
        names = ("device", "dtype", "memory", "precision")
        return cls(
            weights=find_weights(),
            metadata=Detail.from_environment(),
            urls=UrlSettings.from_environment(),
            loras=LoraSettings.from_environment(),
            download=os.environ.get("CASCADE_DOWNLOAD") or "",
            **{name: os.environ.get(f"CASCADE_{name.upper()}") or "auto" for name in names},
        )
