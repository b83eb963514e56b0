"""Training data in a folder: pictures, each with its caption in a text file of the same name."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from cascade.images.colours import PictureError
from cascade.images.decoding import PictureFile
from cascade.sizes import Size
from training.dataset import Dataset, Split
from training.errors import TrainingError, writing
from training.files import whole_file

logger = logging.getLogger(__name__)

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
HELD_OUT = 50
"""One picture in this many is held out for evaluation."""

Captioned = tuple[Path, str]


def is_hidden(name: PurePath) -> bool:
    """Whether a path in a folder of pictures has a part that begins with a dot, or that macOS adds to a zip."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.parts)


def picture_files(folder: Path) -> list[Path]:
    """The pictures of ``folder`` and its sub-folders, sorted by path, without what is hidden; broken links are among them."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS and not path.is_dir() and not is_hidden(path.relative_to(folder))
    )


def read_caption(file: Path, name: str) -> str:
    """The text of a caption's file.

    Args:
        name: the file's name in errors.

    Raises:
        TrainingError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{name} is not UTF-8: byte {error.start + 1} is {error.object[error.start]:#04x}."
        ) from None
    except OSError as error:
        raise TrainingError(f"{name} cannot be read: {error.strerror or error}.") from error


def captioned_pictures(folder: Path) -> list[Captioned]:
    """The pictures of ``folder`` and its sub-folders with their captions, sorted by path.

    Files and folders whose names begin with a dot are ignored.

    Raises:
        TrainingError: there is not a picture, a picture has no caption, or a caption cannot be read or is not UTF-8.
    """
    found = []
    for file in picture_files(folder):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise TrainingError(f"{file} has no caption; it must be beside it, in {caption.name}.")
        found.append((file, read_caption(caption, str(caption)).strip()))
    if not found:
        raise TrainingError(f"{folder} holds no pictures ({', '.join(ENDINGS)}).")
    return found


def read(file: Path, needed: Size | None = None) -> Image.Image:
    """Reads a training picture in RGB. It is decoded in this process, because one's own pictures can be trusted.

    Args:
        needed: (width, height), see `PictureFile.decode`.

    Raises:
        TrainingError: it is truncated, too large, or not a picture.
    """
    try:
        with file.open("rb") as content:
            return PictureFile(content, str(file)).decode(needed=needed)
    except PictureError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        raise TrainingError(f"{file} cannot be read: {error.strerror or error}.") from error


def check_pictures(files: Sequence[Path], record: Path) -> None:
    """Reads every picture once, so that a damaged one is found before training and not hours later.

    Args:
        files: the pictures.
        record: a file that keeps a digest of the names, sizes and times of the pictures that were read. They are read again
            only if it changed.

    Raises:
        TrainingError: a picture cannot be read; the error names it.
    """
    listing = "\n".join(map(_about, files))
    digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    if record.is_file() and record.read_text() == digest:
        return
    with ThreadPoolExecutor() as pool:
        # In groups, because the pool reads all that was submitted before it reports a damaged picture.
        for first in tqdm(range(0, len(files), 64), desc="reading pictures", unit_scale=64, delay=3, leave=False):
            list(pool.map(read, files[first : first + 64]))
    with writing(record), whole_file(record) as part:
        part.write_text(digest)


def _about(file: Path) -> str:
    """A file's name, size and time of modification."""
    try:
        about = file.stat()
    except OSError as error:
        raise TrainingError(f"{file} cannot be read: {error.strerror or error}.") from error
    return f"{file}\t{about.st_size}\t{about.st_mtime_ns}"


def held_out_every(count: int) -> int:
    """One picture in how many is held out, of ``count``: `HELD_OUT`, but of fewer than 200 about four in all."""
    return min(HELD_OUT, max(3, count // 4))


def split_pictures(pictures: Sequence[Captioned], split: Split) -> list[Captioned]:
    """The pictures of one split: every 50th is ``heldout``, all others are ``train``.

    Of fewer than 200 pictures, about four are held out.

    Raises:
        TrainingError: there is only one picture.
    """
    every = held_out_every(len(pictures))
    chosen = [pair for index, pair in enumerate(pictures) if (index % every == 0) == (split == "heldout")]
    if not chosen:
        raise TrainingError(
            f"{pictures[0][0].parent} holds only one picture; training needs another one to evaluate on."
        )
    return chosen


class PictureFolder(Dataset):
    """Pictures from files, scaled to cover the size asked for, and cropped in the middle."""

    def __init__(
        self, pictures: Sequence[Captioned], tokenizer: PreTrainedTokenizerBase, *, size: Size, device: torch.device
    ) -> None:
        self.files = [file for file, _ in pictures]
        super().__init__([caption for _, caption in pictures], tokenizer, size, device)

    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        height, width = size or self.size

        def fitted(index: int) -> np.ndarray:
            return np.asarray(read(self.files[index % len(self.files)], (width, height)))

        pixels = np.empty((len(indices), height, width, 3), np.uint8)
        with ThreadPoolExecutor() as pool:
            for row, picture in zip(pixels, pool.map(fitted, indices.tolist()), strict=True):
                row[:] = picture
        return torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255


class Pictures:
    """A folder of captioned pictures, as a `training.sources.Source`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def captioned(self) -> list[Captioned]:
        return captioned_pictures(self.folder)

    def check(self, record: Path) -> None:
        """Reads all pictures and captions, see `check_pictures`."""
        check_pictures([file for file, _ in self.captioned], record)

    def captions(self) -> list[str]:
        return [caption for _, caption in self.captioned]

    def dataset(self, split: Split, tokenizer: PreTrainedTokenizerBase, *, size: Size, device: torch.device) -> Dataset:
        return PictureFolder(split_pictures(self.captioned, split), tokenizer, size=size, device=device)
