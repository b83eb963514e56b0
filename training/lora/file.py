"""The file of a LoRA: kohya's names of 25 February 2024, all of which ComfyUI reads, and its metadata.

Learned words are stored as OneTrainer bundles them: "bundle_emb.WORD.clip_g".
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from training.lora.adapters import Adapted

FILE = "lora.safetensors"
PREFIXES = {"prior": "lora_unet_", "text_encoder": "lora_te_"}
# The authors' names where published files have other names.
ATTENTION = {"to_q": "attn.to_q", "to_k": "attn.to_k", "to_v": "attn.to_v", "to_out.0": "attn.out_proj"}


def key_of(network: str, layer: str) -> str:
    """kohya's name for a layer's published name, such as "lora_unet_down_blocks_0_2_attention_attn_to_q"."""
    stem, found, last = layer.rpartition("attention.")
    if found and last in ATTENTION:
        layer = f"{stem}attention.{ATTENTION[last]}"
    return PREFIXES[network] + layer.replace(".", "_")


def tensors_of(
    adapted: Mapping[str, Sequence[Adapted]], words: Mapping[str, Tensor], number: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Args:
        adapted: LoRAs by network, "prior" or "text_encoder".
        words: vectors (n, D) of learned words by name. They are stored in float32.
        number: dtype of the matrices.
    """
    tensors: dict[str, Tensor] = {}
    for network, layers in adapted.items():
        for one in layers:
            key = key_of(network, one.layer)
            tensors[f"{key}.lora_down.weight"] = one.down.to("cpu", number).contiguous()
            tensors[f"{key}.lora_up.weight"] = one.up.to("cpu", number).contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(one.alpha, dtype=number)
    for name, vectors in words.items():
        tensors[f"bundle_emb.{name}.clip_g"] = vectors.detach().to("cpu", torch.float32).contiguous()
    return tensors


def metadata_of(
    tensors: Mapping[str, Tensor], *, title: str, resolution: int, rank: int, alpha: float, word: str, model: str
) -> dict[str, str]:
    """Stability AI's model specification 1.0.0, and kohya's fields by which tools tell files apart.

    Args:
        title: of the file.
        resolution: pixels of a side.
        rank, alpha: of the LoRA.
        word: the prompt word for what was learned; "": there is none.
        model: the name of the model that was trained.
    """
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-cascade-v1-prior/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/StableCascade",
        "modelspec.title": title,
        "modelspec.description": f"A LoRA of Stage C of {model}.",
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": f"0x{_digest(tensors)}",
        "ss_base_model_version": "stable_cascade",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
    }
    if word:
        found["modelspec.trigger_phrase"] = word
        found["modelspec.usage_hint"] = f"Write {word} in the prompt."
    return found


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes the file.

    Raises:
        ValueError: a value is infinite, or does not fit into the file's dtype.
    """
    for key, tensor in tensors.items():
        if not math.isfinite(tensor.float().abs().max()):
            raise ValueError(f"{key} holds values that are infinite or no numbers (NaN)")
    # Not by save_file, because only the owner can read its files.
    path.write_bytes(safetensors.torch.save(dict(tensors), dict(metadata)))
