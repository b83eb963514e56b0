"""Training data of one's own: a folder of pictures, each with its caption in a text file of the same name."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cascade.pictures import to_rgb
from cascade.sizes import Size
from training.dataset import Dataset

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def captioned_pictures(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of ``folder`` and its sub-folders with their captions, in the order of their names.

    Raises:
        ValueError: there is no picture, or one has no caption.
    """
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise ValueError(f"{file} has no caption: {caption.name} is not beside it.")
        found.append((file, caption.read_text(encoding="utf-8").strip()))
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(ENDINGS)}).")
    return found


class PictureFolder(Dataset):
    """The part of a folder's pictures that one split gets: every ``held_out``-th is ``heldout``, all others ``train``.

    Pictures are scaled to cover the size asked for, and cropped centrally.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        size: Size,
        split: str,
        device: torch.device,
        held_out: int = 50,
    ) -> None:
        chosen = [
            pair
            for index, pair in enumerate(captioned_pictures(folder))
            if (index % held_out == 0) == (split == "heldout")
        ]
        if not chosen:
            raise ValueError(f"{folder} holds a single picture; training needs another one to look at.")
        self.files = [file for file, _ in chosen]
        super().__init__([caption for _, caption in chosen], tokenizer, size, device)

    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        height, width = size or self.size

        def read(index: int) -> np.ndarray:
            with Image.open(self.files[index % len(self.files)]) as picture:
                whole = to_rgb(ImageOps.exif_transpose(picture))
            return np.asarray(ImageOps.fit(whole, (width, height), Image.Resampling.LANCZOS))

        with ThreadPoolExecutor() as pool:
            pixels = np.stack(list(pool.map(read, indices.tolist())))
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
