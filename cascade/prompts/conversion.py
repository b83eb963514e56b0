"""Embedding files that are pickles -> safetensors files, which `cascade.prompts.embeddings` reads.

torch reads them without running code in them (`weights_only`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cascade.prompts.embeddings import vectors_of


def convert(source: Path, target: Path, width: int = 1280) -> tuple[int, int]:
    """Write the vectors of a file into a safetensors file, as float32, under the name clip_g.

    Args:
        source: written by `torch.save`: A1111's `string_to_param`, a list of dicts, or a dict of tensors.
        target: the new file.
        width: D of the model's text encoder. Of a list of vectors, those of this width are taken.

    Returns:
        The shape of the written vectors, (n, D).

    Raises:
        ValueError: torch cannot read the file, or it has no vectors.
        OSError: a file cannot be read or written.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # for bytes that are not a pickle, the unpickler may raise any error
        raise ValueError(f"{source} is not a file of tensors that torch.save wrote.") from error
    found = [one[None] if one.dim() == 1 else one for one in _vectors(content, width)]
    if not found or any(one.dim() != 2 for one in found):
        raise ValueError(f"{source} has no vectors of an embedding.")
    vectors = torch.cat(found).detach().float().contiguous()
    # Not save_file: its files are readable by the owner only.
    target.write_bytes(save({"clip_g": vectors}, metadata={"format": "pt"}))
    count, size = vectors.shape
    return count, size


def _vectors(content: Any, width: int) -> list[Tensor]:
    """The vectors that ComfyUI takes (comfy/sd1_clip.py, `load_embed`)."""
    if isinstance(content, list):
        tensors = [one for part in content if isinstance(part, Mapping) for one in part.values()]
        return [one for one in tensors if isinstance(one, Tensor) and one.shape[-1:] == (width,)]
    if not isinstance(content, Mapping):
        return []
    parameters = content.get("string_to_param")
    if isinstance(parameters, Mapping):
        return [one for one in parameters.values() if isinstance(one, Tensor)][:1]
    named = {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, Tensor)}
    return [named[name] for name in vectors_of(list(named))]
