"""The pictures of a LoRA's training: a folder, or a zip of one, and the size at which each is trained on."""

import shutil
import stat
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cascade.images.colours import PictureError
from cascade.images.decoding import PictureFile
from cascade.sizes import Size
from training.errors import TrainingError
from training.picture_folder import ENDINGS, is_hidden, picture_files, read, read_caption
from training.shapes import bucket_size

# Limits of a zip: number of files, bytes of one file, and bytes of all. A picture of 64 million pixels, the limit, has at
# most 200 MB as PNG.
MOST_FILES = 10_000
MOST_BYTES = 200_000_000
MOST_BYTES_IN_ALL = 8_000_000_000
CAPTIONS = ".txt"
CHUNK = 1 << 20


@dataclass(frozen=True)
class Captioned:
    """A picture and its caption.

    Attributes:
        file: the picture.
        caption: its text.
        size: (height, width) in pixels at which it is trained on.
    """

    file: Path
    caption: str
    size: Size


def unpack(archive: Path, folder: Path, name: str) -> Path:
    """Writes the pictures and text files of a zip to an empty folder; other files in it are ignored.

    Args:
        archive: a zip file.
        folder: need not exist.
        name: the zip's name in errors.

    Returns:
        The folder.

    Raises:
        TrainingError: it is no zip, damaged or encrypted, too large, or a name in it leads out of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            wanted = [member for member in members if _is_wanted(_path(member))]
            if len(wanted) > MOST_FILES:
                raise TrainingError(f"{name} holds {len(wanted)} pictures and texts; {MOST_FILES} are the limit.")
            left = MOST_BYTES_IN_ALL
            for member in wanted:
                left = _write(name, opened, member, folder, left)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, TrainingError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise TrainingError(f"{name} cannot be unpacked: {error.strerror}.") from error
        if not zipfile.is_zipfile(archive):
            raise TrainingError(f"{name} is not a complete zip file.") from error
        raise TrainingError(f"{name} is a damaged or encrypted zip file: {str(error).rstrip('.')}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _path(member: zipfile.ZipInfo) -> PurePosixPath:
    """A file's path in a zip; some programs on Windows write backslashes."""
    return PurePosixPath(member.filename.replace("\\", "/"))


def _is_wanted(name: PurePosixPath) -> bool:
    return not is_hidden(name) and name.suffix.lower() in (*ENDINGS, CAPTIONS)


def _write(archive: str, opened: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, left: int) -> int:
    """Writes one file. Returns how many bytes may still follow."""
    name = _path(member)
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        raise TrainingError(f"{archive} holds {member.filename!r}, whose path leads out of the folder.")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise TrainingError(f"{archive} holds {member.filename!r}, which is a link, not a picture.")
    target = folder.joinpath(*name.parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Counts the unpacked bytes, because the size in the header may be wrong.
    written = 0
    with opened.open(member) as source, target.open("wb") as file:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > MOST_BYTES:
                raise TrainingError(
                    f"{archive} holds {member.filename!r}, which has over {MOST_BYTES // 10**6} MB unpacked, the limit."
                )
            if written > left:
                raise TrainingError(
                    f"{archive} has over {MOST_BYTES_IN_ALL // 10**9} GB of pictures unpacked, the limit."
                )
            file.write(chunk)
    return left - written


def find_pictures(path: Path, scratch: Path, name: str | None = None) -> Path:
    """The folder of pictures that a path means: itself, or a zip unpacked to ``scratch``.

    name: the zip's name in errors; None: its file's name.

    Raises:
        TrainingError: there is neither, see `unpack`.
    """
    if path.is_dir():
        return path
    if not path.is_file():
        raise TrainingError(f"There is no folder or zip file {path}.")
    shutil.rmtree(scratch, ignore_errors=True)
    return unpack(path, scratch, name or path.name)


def caption_of(file: Path, *, otherwise: str, prefix: str, word: str) -> str:
    """A picture's caption.

    Args:
        file: the picture; a text file of its name beside it has its caption.
        otherwise: the caption of pictures without such a file.
        prefix: put before every caption.
        word: put before every caption that does not have it.

    Raises:
        TrainingError: there is none, or it cannot be read or is not UTF-8.
    """
    beside = file.with_suffix(CAPTIONS)
    if beside.is_file():
        caption = " ".join(read_caption(beside, beside.name).split())
    elif otherwise or prefix or word:
        caption = otherwise
    else:
        raise TrainingError(
            f"{file.name} has no caption: give it {beside.name}, or one caption or word for all pictures."
        )
    caption = f"{prefix}{caption}"
    if word and word.lower() not in caption.lower():
        caption = f"{word}, {caption}" if caption.strip() else word
    return caption.strip()


def captioned_pictures(folder: Path, resolution: int, *, caption: str, prefix: str, word: str) -> list[Captioned]:
    """The pictures of a folder and its sub-folders, in the order of their names. Each is read once.

    Raises:
        TrainingError: there is none, one is damaged, or has no caption.
    """
    files = picture_files(folder)
    if not files:
        raise TrainingError(f"There are no pictures ({', '.join(ENDINGS)}) in {folder.name or folder}.")
    captions = [caption_of(file, otherwise=caption, prefix=prefix, word=word) for file in files]
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(lambda file: _size(file, resolution), files))
    return [Captioned(*one) for one in zip(files, captions, sizes, strict=True)]


def _size(file: Path, resolution: int) -> Size:
    try:
        with file.open("rb") as content:
            width, height = PictureFile(content, file.name).size()
    except PictureError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        raise TrainingError(f"{file.name} cannot be read: {error.strerror or error}.") from error
    size = bucket_size(width, height, resolution)
    read(file, (size[1], size[0]))  # so that a damaged picture is found before training
    return size


def buckets(pictures: Sequence[Captioned]) -> dict[Size, list[int]]:
    """The pictures' indices by size, in the order of their first ones."""
    found: dict[Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        found.setdefault(picture.size, []).append(index)
    return found
