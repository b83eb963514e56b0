"""A file becomes a picture as one sees it in a viewer: upright, the first frame of an animation, in sRGB on white.

Knows nothing of processes and limits of time and memory, see `child`. Imports no torch, which would take seconds there.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import ExifTags, Image, ImageOps

from cascade.images.bands import Convert, Pixels, Size, Upright, turned
from cascade.images.colours import Conversion, DamagedError, PictureError

if TYPE_CHECKING:
    import numpy as np

# Those that Pillow decodes by itself; left to choose, it would also start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEGS = ("JPEG", "MPO")
# A phone's 50 megapixels, and some. Pillow takes 4 bytes a pixel.
MOST_PIXELS = 64_000_000
# The most elongated picture that can be made is 2048 x 64.
LONGEST_SHAPE = 32
# Cameras and encoders write one or about ten; a decoder goes through the whole picture for each of them.
MOST_SCANS = 100
# Up to this many pixels, a picture is scaled by Lanczos alone, and a JPEG file decoded at its full size: what comes of
# larger ones is very near to that, in a fraction of the time.
ORDINARY_PIXELS = 2048 * 2048
# A JPEG file is shrunk while it is decoded to no less than this times the size that is needed.
DRAFT_MARGIN = 2
# Pillow decodes WebP through three canvases: at 64 megapixels 994 MB, where OpenCV takes 200 to 520.
LARGE_WEBP_PIXELS = 2**24
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG stores a transparent grey as a value of as many bits as a pixel has; Pillow scales the pixels alone.
GREY_SCALES = {"L;2": 85, "L;4": 17}


class PictureFile:
    """A file that is a picture; its pixels are decoded once at most.

    Args:
        file: stays open until it is decoded. Opened by its path, Pillow would map some kinds of files into memory, and
            garble what lies on its side in them.
        name: what errors and logs call it.

    Raises:
        PictureError: the file is no picture of these formats, it has more than 64 million pixels or 100 scans, or one side
            is more than 32 times the other.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        try:
            image = Image.open(file, formats=FORMATS)  # reads the header
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PictureError(f"{name} is too large: {MOST_PIXELS:,} pixels are the limit.") from error
        except MemoryError as error:
            raise PictureError(f"{name} needs more memory to be read than is free.") from error
        except Exception as error:  # formats raise whatever they stumble over
            raise PictureError(f"{name} is no picture of one of the formats {', '.join(FORMATS)}.") from error
        mend_transparent_colour(image)
        self.image: Image.Image | None = image
        self.format = image.format or "picture"
        self.pixels = image.width * image.height
        size = f"{image.width}x{image.height} pixels"
        if self.pixels > MOST_PIXELS:
            raise PictureError(f"{name} is too large: it has {size}, and {MOST_PIXELS:,} are the limit.")
        if self.format in JPEGS and (scans := count_scans(file)) > MOST_SCANS:
            raise PictureError(f"{name} has {scans} scans; {MOST_SCANS} are the limit.")
        if max(image.size) > LONGEST_SHAPE * min(image.size):
            raise PictureError(f"{name} has {size}; one side may be at most {LONGEST_SHAPE} times the other.")

    def size(self) -> Size:
        """(width, height) of the upright picture. Decodes PNG, where what turns it may stand behind the pixels.

        Raises:
            DamagedError, MemoryError: see `decode`.
        """
        with self._named():
            return turned(self.image.size, turn_of(self.image))

    def decode(
        self, background: str | None = "white", needed: Size | None = None, *, mask: bool = False
    ) -> Image.Image:
        """The upright picture.

        Args:
            background: what is transparent is laid on this colour; None: it stays transparent.
            needed: the (width, height) to scale it to. What exceeds that shape is cut off evenly. None: its own size.
            mask: read it as a mask: on black, scaled with nothing cut off, each pixel the mean of those it stands for.

        Returns:
            RGB; of a mask L; RGBA if it has transparency and no background.

        Raises:
            PictureError: it has 32 bits a channel.
            DamagedError: its pixels cannot be decoded; not all formats tell that from a lack of memory.
            MemoryError: some do.
        """
        with self._named():
            picture = self._pixels(needed)
        stored = picture.stored
        if mask:
            to_rgb = Conversion.of(stored, self.name, "black").convert
            grey = picture.joined(lambda band: to_rgb(band).convert("L"))
            return grey if needed is None else grey.resize(needed, Image.Resampling.BOX)
        conversion = Conversion.of(stored, self.name, background)
        if stored.mode in ("L", "RGB", "CMYK") and not stored.has_transparency_data:
            return conversion.whole(fitted(picture, needed))  # fewer pixels, whose colours are then converted
        return fitted(picture, needed, conversion.convert)

    def _pixels(self, needed: Size | None) -> Upright:
        """The picture, in its own colours and size, or if it is a large JPEG file at least in that of need."""
        image, self.image = self.image, None
        if needed is not None:
            draft(image, needed)
        if self.format != "WEBP" or self.pixels <= LARGE_WEBP_PIXELS or image.is_animated:
            return upright(image)
        turn, found = turn_of(image), (image.size, image.mode, image.info)
        del image  # and with it the canvases
        return Upright(decode_webp(self.file, *found), turn)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Names the picture in errors."""
        try:
            yield
        except (PictureError, MemoryError):
            raise
        except Exception as error:  # formats raise whatever they stumble over
            raise DamagedError(f"{self.name} is a damaged {self.format} file.") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes a picture upright. All else that EXIF says does not matter, and may be anything."""
    if image.format == "TIFF":
        return None  # Pillow does it while it decodes, and says the size that comes of it
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # whatever EXIF makes Pillow stumble over
        return None


def upright(image: Image.Image) -> Upright:
    """A picture, decoded, and what its EXIF says turns it. With odd EXIF too, as long as that says which side is up."""
    image.load()
    return Upright(image, turn_of(image))


def count_scans(file: BinaryIO) -> int:
    """Of a JPEG file, with those of its thumbnail. Only metadata may hold this marker by chance."""
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    return scans


def draft(image: Image.Image, needed: Size) -> None:
    """Let a large JPEG file be decoded at a half, a quarter or an eighth of its size, if that suffices."""
    if image.format not in JPEGS or image.width * image.height <= ORDINARY_PIXELS:
        return
    width, height = turned(image.size, turn_of(image))
    scale = DRAFT_MARGIN * max(needed[0] / width, needed[1] / height)
    if scale < 1:
        image.draft(None, (math.ceil(scale * image.width), math.ceil(scale * image.height)))


def fitted(picture: Upright, needed: Size | None, convert: Convert | None = None) -> Image.Image:
    """A picture, converted, cut evenly to a shape and scaled, as `ImageOps.fit` does it; a large one may be averaged first."""
    if needed is None:
        return picture.joined(convert)
    if math.prod(picture.size) <= ORDINARY_PIXELS:
        return ImageOps.fit(picture.joined(convert), needed, Image.Resampling.LANCZOS)
    return picture.scaled(needed, convert)


def mend_transparent_colour(image: Image.Image) -> None:
    """Make the transparent colour of a PNG file one of those that its pixels get in Pillow."""
    clear = image.info.get("transparency")
    if image.format != "PNG" or clear is None or not image.tile:
        return
    rawmode = image.tile[0].args
    if rawmode in GREY_SCALES:
        image.info["transparency"] = clear * GREY_SCALES[rawmode]
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in clear)


@dataclass(frozen=True)
class Array:
    """A picture that OpenCV has decoded. In Pillow's layout it would be another one of 4 bytes a pixel.

    Args:
        pixels: uint8 (height, width, 3 or 4), blue first.
        info: see Pillow's `Image.info`.
    """

    pixels: "np.ndarray"
    info: dict[str | tuple[int, int], Any]

    @property
    def mode(self) -> str:
        return "RGBA" if self.has_transparency_data else "RGB"

    @property
    def size(self) -> Size:
        return self.pixels.shape[1::-1]

    @property
    def has_transparency_data(self) -> bool:
        return self.pixels.shape[2] == 4

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        pixels = self.pixels[top:bottom, left:right].tobytes()
        order = "BGRA" if self.has_transparency_data else "BGR"
        return Image.frombytes(self.mode, (right - left, bottom - top), pixels, "raw", order)


def decode_webp(file: BinaryIO, size: Size, mode: str, info: dict[str | tuple[int, int], Any]) -> Pixels:
    """A WebP file's picture as stored, by OpenCV, with the size, mode and `info` that Pillow has found."""
    import cv2  # here, because it takes 0.1 s and 40 MB
    import numpy as np

    # Left to find the size by itself, OpenCV copies the picture in the end: at 64 megapixels 192 MB.
    place = np.empty((*reversed(size), len(mode)), np.uint8)
    try:
        pixels = cv2.imread(file.name, dst=place, flags=cv2.IMREAD_UNCHANGED)
    except cv2.error:  # its headers disagree about transparency
        del place
        pixels = cv2.imread(file.name, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise OSError("OpenCV does not decode it")
    return Array(pixels, info)
