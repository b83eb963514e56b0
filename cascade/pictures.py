"""Pictures that people send: checked before they are decoded, and turned into what one sees in a viewer.

That is: turned as EXIF says, laid on white where it is transparent, the first frame of an animation, 8 bits a channel.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Those that Pillow decodes by itself; left to choose, it would also start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# A phone's 50 megapixels, and some; decoded with transparency, it takes 256 MB.
MOST_PIXELS = 64_000_000
# The most elongated picture that can be made is 2048 x 64.
LONGEST_SHAPE = 32


def read_picture(path: Path, name: str, background: str | None = "white") -> Image.Image:
    """Read a picture of any usual format, depth and colour mode.

    Args:
        path: the file. Its ending does not matter.
        name: what the errors call it.
        background: what is transparent is laid on this colour; None: it stays transparent.

    Returns:
        RGB, of any size from 1x1; RGBA if it stays transparent.

    Raises:
        ValueError: the file is no picture of these formats, it has more than 64 million pixels, or one side is more
            than 32 times the other: of those, nothing is decoded. Or it is damaged, or has 32 bits a channel.
    """
    try:
        image = Image.open(path, formats=FORMATS)  # reads the header
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {MOST_PIXELS:,} pixels are the limit.") from error
    except Exception as error:  # formats raise whatever they stumble over
        raise ValueError(f"{name} is no picture of one of the formats {', '.join(FORMATS)}.") from error
    with image:
        size = f"{image.width}x{image.height} pixels"
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{name} is too large: it has {size}, and {MOST_PIXELS:,} are the limit.")
        if max(image.size) > LONGEST_SHAPE * min(image.size):
            raise ValueError(f"{name} has {size}; one side may be at most {LONGEST_SHAPE} times the other.")
        try:
            image.load()
            turned = ImageOps.exif_transpose(image)
        except Exception as error:
            raise ValueError(f"{name} is a damaged {image.format} file.") from error
    return to_rgb(turned, name, background)


def to_rgb(image: Image.Image, name: str = "The image", background: str | None = "white") -> Image.Image:
    """A picture of any mode in RGB. What is transparent is laid on the background's colour; 16 bits become 8.

    Without a background, a picture that has transparency is returned in RGBA.

    Raises:
        ValueError: it has 32 bits a channel, of which nothing says what is white. `name` is what the error calls it.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"{name} has 32 bits a channel; 8 or 16 are read.")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))  # Pillow would clip at 255
    if image.has_transparency_data:
        if background is None:
            return image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return image.convert("RGB")
