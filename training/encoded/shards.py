"""Encoded pictures on disk: safetensors files, from which rows are read in any order.

``pictures/*.safetensors`` hold pictures of several sizes. The tensors of N pictures of HEIGHT x WIDTH pixels, all float16:

    HEIGHTxWIDTH.latents    (N, 16, h, w), semantic latents
    HEIGHTxWIDTH.image      (N, 1, D), CLIP image embeddings
    HEIGHTxWIDTH.text       (N, 77, D), the text encoder's hidden states before the final LayerNorm
    HEIGHTxWIDTH.pooled     (N, 1, D), its projected embeddings

``empty.safetensors`` has ``text`` (77, D) and ``pooled`` (1, D) of the empty caption. A picture of 1024x1024 pixels takes 220 kB
with the published encoders, of which 197 kB are the hidden states.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cascade.sizes import Size
from training.errors import FILE_ERRORS, TrainingError, summary
from training.files import whole_file
from training.picture_folder import held_out_every

PARTS = ("latents", "image", "text", "pooled")
PICTURES = "pictures"
EMPTY = "empty.safetensors"
KEY = re.compile(rf"(\d+)x(\d+)\.({'|'.join(PARTS)})")
OPEN_FILES = 256


def shard_file(folder: Path, name: str) -> Path:
    """The path of the file with this name in a folder of encoded pictures."""
    return folder / PICTURES / f"{name}.safetensors"


def write_shard(file: Path, pictures: Mapping[Size, Sequence[Mapping[str, Tensor]]]) -> None:
    """Writes one file, which is complete or absent.

    Args:
        file: its path.
        pictures: by (height, width) in pixels, the tensors of each picture by the names in `PARTS`, without the dimension N.
    """
    tensors = {
        f"{height}x{width}.{part}": torch.stack([one[part].half().cpu() for one in some])
        for (height, width), some in pictures.items()
        for part in PARTS
    }
    with whole_file(file) as written:
        written.write_bytes(save(tensors))  # safetensors' own files are readable by the owner only


def write_empty(folder: Path, text: Tensor, pooled: Tensor) -> None:
    """Writes the empty caption's embeddings, (77, D) and (1, D)."""
    with whole_file(folder / EMPTY) as part:
        part.write_bytes(save({"text": text.half().cpu(), "pooled": pooled.half().cpu()}))


@functools.lru_cache(OPEN_FILES)
def _opened(file: Path) -> Any:
    return safe_open(file, "pt")


class EncodedPictures:
    """The encoded pictures of a folder, by size.

    Args:
        folder: has files of `write_shard`, and that of `write_empty`.
        device: of the tensors that are drawn.

    Attributes:
        empty: ``text`` (77, D) and ``pooled`` (1, D) of the empty caption, float32 on the device.
        held_out: the number of pictures that are held out.

    Raises:
        TrainingError: the folder has no encoded pictures, or a file is damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.files = sorted((folder / PICTURES).glob("*.safetensors"))
        if not self.files or not (folder / EMPTY).is_file():
            raise TrainingError(f"{folder} has no encoded pictures; make them with scripts/encode-pictures.")
        self.empty = {
            name: value.float().to(device) for name, value in self._reading(folder / EMPTY, load_file).items()
        }
        counts = [self._reading(file, self._counts) for file in self.files]
        every = held_out_every(sum(sum(one.values()) for one in counts))
        # By size, the file and the row of each picture, (N, 2).
        self._trained: dict[Size, Tensor] = {}
        self._held_out: dict[Size, Tensor] = {}
        first = 0
        for size in sorted({size for one in counts for size in one}):
            places = torch.cat(
                [
                    torch.stack([torch.full((one[size],), number), torch.arange(one[size])], dim=1)
                    for number, one in enumerate(counts)
                    if size in one
                ]
            )
            kept = torch.arange(first, first + len(places)) % every == 0
            first += len(places)
            for found, chosen in ((self._trained, places[~kept]), (self._held_out, places[kept])):
                if len(chosen):
                    found[size] = chosen
        if not self._trained:
            raise TrainingError(f"{folder} has only one picture; training needs another one to evaluate on.")
        self.held_out = sum(map(len, self._held_out.values()))
        self._shares = torch.tensor([len(one) for one in self._trained.values()], dtype=torch.float64)

    def __len__(self) -> int:
        """The number of pictures that are trained on."""
        return sum(map(len, self._trained.values()))

    @staticmethod
    def _reading(file: Path, read: Any) -> Any:
        try:
            return read(file)
        except FILE_ERRORS as error:
            raise TrainingError(f"{file} is damaged ({summary(error)}); remove it and encode it again.") from error

    @staticmethod
    def _counts(file: Path) -> dict[Size, int]:
        """The number of pictures in a file by size."""
        opened, found = _opened(file), {}
        for key in opened.keys():  # noqa: SIM118  not a mapping
            match = KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"it has {key!r}, which is of no encoded picture")
            found[int(match[1]), int(match[2])] = opened.get_slice(key).get_shape()[0]
        return found

    def widths(self) -> dict[str, int]:
        """The length D of ``image``, ``text`` and ``pooled``."""
        size, places = next(iter(self._trained.items()))
        return {name: value.shape[-1] for name, value in self._read(size, places[:1]).items() if name != "latents"}

    def draw(self, index: int, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Micro-batch ``index``: `PARTS` of random pictures of one size, float32 (count, ...) on the device.

        All pictures are equally likely. The size depends on the index only, so that all processes have equal work.
        """
        own = torch.Generator().manual_seed(index)
        size = list(self._trained)[int(torch.multinomial(self._shares, 1, generator=own))]
        places = self._trained[size]
        chosen = torch.randint(len(places), (count,), generator=torch.Generator().manual_seed(generator.initial_seed()))
        return self._read(size, places[chosen])

    def unseen(self, count: int) -> list[dict[str, Tensor]]:
        """At most ``count`` held-out pictures, one batch for each size."""
        batches = []
        for size, places in self._held_out.items():
            batches += [self._read(size, places[:count])] if count else []
            count -= min(count, len(places))
        return batches

    def _read(self, size: Size, places: Tensor) -> dict[str, Tensor]:
        height, width = size
        rows = {part: [] for part in PARTS}
        for number, row in places.tolist():
            opened = _opened(self.files[number])
            for part in PARTS:
                rows[part].append(opened.get_slice(f"{height}x{width}.{part}")[row])
        return {part: self._on_device(torch.stack(some)) for part, some in rows.items()}

    def _on_device(self, value: Tensor) -> Tensor:
        """float32, on the device. From pinned memory, because copies from other memory wait for the GPU's work before them."""
        if self.device.type == "cuda":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True).float()
