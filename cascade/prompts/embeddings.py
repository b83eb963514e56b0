"""Textual-inversion embeddings: vectors in place of words. A prompt names them by their file.

A file holds the vectors under any of the names that trainers use:

    clip_g                               kohya's sd-scripts, OneTrainer, diffusers' advanced scripts; beside it `clip_l`, unread
    string_to_param.*                    A1111's files, converted
    bundle_emb.NAME.clip_g               OneTrainer's, inside of a LoRA's file; all names of the file, joined
    bundle_emb.NAME.string_to_param.*    the same, A1111's
    anything else                        the first tensor: diffusers' `learned_embeds` with the word as its name, `emb_params`

The order and the search are ComfyUI's (comfy/sd1_clip.py, `load_embed`). Unlike ComfyUI, a file of another width is
refused, and so are pickles: reading one can run code.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# The first of these suffixes is preferred, if files have the same stem.
SUFFIX = ".safetensors"
PICKLES = (".pt", ".bin")

_BUNDLED = re.compile(r"bundle_emb\..+\.(?P<kind>clip_g|string_to_param\.[^.]*)")


class EmbeddingError(ValueError):
    """An embedding cannot be used. The message is a clause that begins with the file's name."""


class Embeddings:
    """The embeddings that prompts may name.

    Args:
        width: D of the text encoder's word embeddings: 1280 in the published model.
        folder: holds the files, in sub-folders too; it need not exist. None: there is none. It is read when an embedding is
            asked for, so files may come and go while the model is loaded.
        words: vectors (n, D) or (D,) of any dtype, by name. They are preferred to files.
    """

    def __init__(
        self, width: int, folder: Path | None = None, words: Mapping[str, Tensor] = MappingProxyType({})
    ) -> None:
        self.width = width
        self.folder = folder
        self.words = words

    def with_words(self, words: Mapping[str, Tensor]) -> "Embeddings":
        """These embeddings and further `words`, see the class."""
        return Embeddings(self.width, self.folder, {**self.words, **words})

    def find(self, name: str) -> Tensor | None:
        """The vectors of an embedding, float32 (n, D) with n of at least 1, or None if there is none of this name.

        Args:
            name: a file's name, with or without its suffix, and with or without the sub-folders that it lies in. Upper and
                lower case differ.

        Raises:
            EmbeddingError: the file is a pickle, damaged, or has no vectors of this width.
        """
        if name in self.words:
            return self._checked(name, self.words[name])
        path = self.file(name)
        return None if path is None else self._read(path)

    def file(self, name: str) -> Path | None:
        """The file that `find` reads, or None if it reads none."""
        if self.folder is None or not name or name in self.words:
            return None
        files = self._files()
        folders = sorted({""} | {f"{Path(path).parent.as_posix()}/" for path in files if "/" in path})
        candidates = (f"{folder}{name}{suffix}" for folder in folders for suffix in ("", SUFFIX, *PICKLES))
        return next((self.folder / path for path in candidates if path in files), None)

    def names(self) -> list[str]:
        """All names that `find` finds, except pickles, sorted."""
        return sorted({*self.words, *(path.removesuffix(SUFFIX) for path in self._files() if path.endswith(SUFFIX))})

    def _files(self) -> set[str]:
        """Paths of the files, relative to the folder."""
        if self.folder is None:
            return set()
        return {
            Path(where, file).relative_to(self.folder).as_posix()
            for where, _, files in os.walk(self.folder)
            for file in files
            if file.endswith((SUFFIX, *PICKLES))
        }

    def _read(self, file: Path) -> Tensor:
        path = file.relative_to(self.folder).as_posix() if self.folder else file.name
        if not path.endswith(SUFFIX):
            raise EmbeddingError(
                f"{path} is a pickle, which can run code when it is read; convert it with scripts/convert-embedding"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = [self._checked(path, opened.get_tensor(name)) for name in vectors_of(list(opened.keys()))]
        except (SafetensorError, OSError) as error:
            raise EmbeddingError(f"{path} is damaged or no safetensors file: {' '.join(str(error).split())}") from error
        if not tensors:
            raise EmbeddingError(f"{path} has no tensors")
        return torch.cat(tensors)

    def _checked(self, what: str, vectors: Tensor) -> Tensor:
        vectors = vectors[None] if vectors.dim() == 1 else vectors
        if vectors.dim() != 2 or not len(vectors):
            raise EmbeddingError(f"{what} has a tensor of shape {tuple(vectors.shape)}, not (n, {self.width})")
        if vectors.shape[1] != self.width:
            raise EmbeddingError(
                f"{what} has vectors of {vectors.shape[1]} numbers, and this model's text encoder takes {self.width}: it was "
                "made for another model"
            )
        vectors = vectors.detach().float().cpu()
        if not vectors.isfinite().all():
            raise EmbeddingError(f"{what} has numbers that are not finite")
        return vectors


def vectors_of(names: list[str]) -> list[str]:
    """The names of the tensors that are the vectors, in the order in which they are joined."""
    converted = [name for name in names if name.startswith("string_to_param.")]
    if converted:
        return converted[:1]
    if "clip_g" in names:
        return ["clip_g"]
    matches = [match for name in names if (match := _BUNDLED.fullmatch(name))]
    parameters = [match.string for match in matches if match["kind"] != "clip_g"]
    return parameters or [match.string for match in matches] or names[:1]
