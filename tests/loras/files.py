"""Adapters with random values for the tiny networks of components.py."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def lora(components: dict[str, Any], path: Path, seed: int, *networks: str, rank: int = 2, size: float = 0.3) -> Path:
    """A LoRA of all matrices and 1x1 convolutions of networks, "prior", "decoder" or "text_encoder"."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for network in networks or ("prior", "text_encoder"):
        for name, weight in components[network].state_dict().items():
            if (
                not name.endswith(".weight")
                or weight.ndim < 2
                or "embedding." in name.replace("embeddings.", "") * (network == "text_encoder")
                or "depthwise" in name
                or "embedding.weight" in name
            ):
                continue
            stem = f"{network}.{name.removesuffix('.weight')}"
            rows, columns, *kernel = weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, *kernel, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = size * torch.randn(rows, rank, *[1] * len(kernel), generator=generator)
    save_file(tensors, path)
    return path


def full(components: dict[str, Any], path: Path, seed: int, network: str = "prior") -> Path:
    """Differences of every tensor, in ComfyUI's names: biases and all that no LoRA changes, too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{network}.{name}.diff": 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in components[network].state_dict().items()
    }
    save_file(tensors, path)
    return path
