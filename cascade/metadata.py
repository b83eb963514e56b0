"""Pictures as files that carry what made them: a JSON object in PNG's text, in the EXIF of JPEG and WebP."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

VERSION = "0.1.0"

# Where each standard keeps words about a picture.
PNG_KEYWORD = "Description"
EXIF_TAG = 0x010E  # ImageDescription, which is ASCII

# A JPEG's EXIF fits into one segment of 65,533 bytes; two texts of this length, escaped, leave room for the rest.
LONGEST_EXIF = 65_000
SHORTENED = 2_000


def save_picture(image: Image.Image, path: Path, record: Mapping[str, Any], quality: int = 80) -> None:
    """Write a picture in the format of its path's ending.

    Args:
        image: RGB.
        path: ends in .webp, .jpg or .png.
        record: what made the picture. Its texts are shortened in a JPEG that could not hold them: to 2,000 characters,
            where the text encoder reads 77 tokens.
        quality: 0 to 100, of WebP and JPEG; PNG loses nothing.

    Raises:
        ValueError: another ending.
        OSError: the file cannot be written.
    """
    text = json.dumps(record)
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text(PNG_KEYWORD, text)
        image.save(path, "PNG", pnginfo=info)
    elif path.suffix == ".webp":
        image.save(path, "WEBP", quality=quality, exif=_exif(text))
    elif path.suffix == ".jpg":
        if len(text) > LONGEST_EXIF:
            text = json.dumps({key: x[:SHORTENED] if isinstance(x, str) else x for key, x in record.items()})
        image.save(path, "JPEG", quality=quality, exif=_exif(text))
    else:
        raise ValueError(f"{path.name} must end in .webp, .jpg or .png.")


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_TAG] = text
    return exif
