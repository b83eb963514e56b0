"""Reference inputs, outputs and weights: see tests/fixtures/README.md."""

import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("CASCADE_FIXTURES") or Path(__file__).parent / "fixtures")
SEED = int(os.environ.get("CASCADE_FIXTURES_SEED") or 0)


def description(name: str) -> dict[str, Any]:
    """NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """NAME.safetensors."""
    return load_file(FOLDER / f"{name}.safetensors")


def weights(name: str) -> dict[str, Tensor]:
    """The reference network's weights, under the authors' key names: a function of key, shape and seed."""
    return {key: weight(key, shape) for key, shape in description(name)["state_dict"].items()}


def weight(key: str, shape: Sequence[int], seed: int = SEED) -> Tensor:
    generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) & 0x7FFFFFFF) + seed)
    noise = torch.randn(shape, generator=generator)
    if key.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if key.endswith(("running_mean", "bias", "gamma", "beta", "gammas")):
        return 0.1 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    return noise / math.sqrt(math.prod(shape[1:]))
