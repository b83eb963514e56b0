"""Decodes a file to a picture as a viewer shows it: upright, the first frame of an animation, in sRGB on white.

`child` runs it in a process with limits of time and memory. Does not import torch, which would take seconds there.
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

# Formats that Pillow decodes itself. Without this list, it would start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
JPEGS = ("JPEG", "MPO")
# Phones make pictures of 50 megapixels. Pillow takes 4 bytes per pixel.
MOST_PIXELS = 64_000_000
# Largest ratio of the sides. The most elongated picture that can be made is 4096 x 64.
LONGEST_SHAPE = 64
# Scans of a progressive JPEG file. Cameras and encoders write one or about ten. A decoder processes the whole picture for each.
MOST_SCANS = 100
# Up to this many pixels, pictures are scaled by Lanczos alone, and JPEG files decoded at full size. For larger pictures,
# shortcuts give nearly the same result in a fraction of the time.
ORDINARY_PIXELS = 2048 * 2048
# While it is decoded, a JPEG file is shrunk to no less than this times the target size.
DRAFT_MARGIN = 2
# Above this many pixels, WebP and AVIF files are decoded without a Pillow image. At 64 megapixels, Pillow takes 994 MB for
# WebP, through three canvases, and up to 640 MB for AVIF.
LARGE_PIXELS = 2**24
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG stores the transparent grey with as many bits as a pixel has. Pillow scales the pixels to 8 bits, but not this value.
GREY_SCALES = {"L;2": 85, "L;4": 17}


class PictureFile:
    """A picture file. Its pixels can be decoded only once.

    Args:
        file: must stay open until the picture is decoded. Given a path instead, Pillow would map some formats into memory and
            garble rotated pictures.
        name: the picture's name in errors and logs.

    Raises:
        PictureError: the file is not a picture in one of `FORMATS`, it has more than 64 million pixels or 100 scans, or one
            side is more than 64 times the other.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        try:
            image = Image.open(file, formats=FORMATS)  # reads the header
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise PictureError(f"{name} is too large: {MOST_PIXELS:,} pixels are the limit.") from error
        except MemoryError as error:
            raise PictureError(f"{name} needs more memory to be read than is free.") from error
        except Exception as error:  # Pillow's formats raise various errors
            raise PictureError(f"{name} is not a picture in one of the formats {', '.join(FORMATS)}.") from error
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
        """(width, height) of the upright picture. Decodes a PNG file, whose EXIF may come after the pixels.

        Raises:
            DamagedError, MemoryError: see `decode`.
        """
        with self._named():
            return turned(self.image.size, turn_of(self.image))

    def decode(
        self, background: str | None = "white", needed: Size | None = None, *, mask: bool = False
    ) -> Image.Image:
        """Decode the upright picture.

        Args:
            background: colour onto which transparent parts are composited; None: they stay transparent.
            needed: the target's (width, height). What exceeds its aspect ratio is cropped evenly. None: the picture's size.
            mask: decode it as a mask: on black, scaled without cropping, each pixel the mean of those that it covers.

        Returns:
            RGB; L for a mask; RGBA if it has transparency and `background` is None.

        Raises:
            PictureError: it has 32 bits per channel.
            DamagedError: its pixels cannot be decoded. Some formats raise this when memory is short.
            MemoryError: memory is short.
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
            return conversion.whole(fitted(picture, needed))  # scales first, so that fewer pixels are converted
        return fitted(picture, needed, conversion.convert)

    def _pixels(self, needed: Size | None) -> Upright:
        """Decode the pixels in the picture's own colours and size. A large JPEG file may be shrunk, to no less than `needed`."""
        image, self.image = self.image, None
        if needed is not None:
            draft(image, needed)
        if self.format not in ("WEBP", "AVIF") or self.pixels <= LARGE_PIXELS or image.is_animated:
            return upright(image)
        turn = turn_of(image)
        if self.format == "AVIF":
            return Upright(decode_avif(image), turn)
        found = image.size, image.mode, image.info
        del image  # frees Pillow's canvases
        return Upright(decode_webp(self.file, *found), turn)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Turn decoders' errors into a DamagedError with the picture's name."""
        try:
            yield
        except (PictureError, MemoryError):
            raise
        except Exception as error:  # Pillow's formats raise various errors
            raise DamagedError(f"{self.name} is a damaged {self.format} file.") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The rotation or flip of EXIF's orientation; None if there is none. Ignores damage to other EXIF entries."""
    if image.format == "TIFF":
        return None  # Pillow rotates it during decoding, and `image.size` is already the upright size
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises various errors for damaged EXIF
        return None


def upright(image: Image.Image) -> Upright:
    """Decode a picture, and add the rotation or flip of its EXIF orientation."""
    image.load()
    return Upright(image, turn_of(image))


def count_scans(file: BinaryIO) -> int:
    """Count the scans of a JPEG file and of its thumbnail. Metadata may contain this marker by chance, picture data cannot."""
    place = file.tell()
    file.seek(0)
    scans = file.read().count(b"\xff\xda")
    file.seek(place)
    return scans


def draft(image: Image.Image, needed: Size) -> None:
    """Make Pillow decode a large JPEG file at 1/2, 1/4 or 1/8 of its size, if that suffices for `needed`."""
    if image.format not in JPEGS or image.width * image.height <= ORDINARY_PIXELS:
        return
    width, height = turned(image.size, turn_of(image))
    scale = DRAFT_MARGIN * max(needed[0] / width, needed[1] / height)
    if scale < 1:
        image.draft(None, (math.ceil(scale * image.width), math.ceil(scale * image.height)))


def fitted(picture: Upright, needed: Size | None, convert: Convert | None = None) -> Image.Image:
    """Convert, crop evenly and scale a picture, like `ImageOps.fit`. Large pictures are averaged before Lanczos."""
    if needed is None:
        return picture.joined(convert)
    if math.prod(picture.size) <= ORDINARY_PIXELS:
        return ImageOps.fit(picture.joined(convert), needed, Image.Resampling.LANCZOS)
    return picture.scaled(needed, convert)


def mend_transparent_colour(image: Image.Image) -> None:
    """Scale the transparent colour of a PNG file as Pillow scales its pixels."""
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
    """A decoded picture, kept as an array. A Pillow image would be a second copy of 4 bytes per pixel.

    Attributes:
        pixels: uint8 (height, width, channels).
        mode: "L", "RGB" or "RGBA".
        order: the order of the channels, as Pillow names it: `mode`, or "BGR" or "BGRA".
        info: see Pillow's `Image.info`.
    """

    pixels: "np.ndarray"
    mode: str
    order: str
    info: dict[str | tuple[int, int], Any]

    @property
    def size(self) -> Size:
        return self.pixels.shape[1::-1]

    @property
    def has_transparency_data(self) -> bool:
        return self.mode == "RGBA"

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        pixels = self.pixels[top:bottom, left:right].tobytes()
        return Image.frombytes(self.mode, (right - left, bottom - top), pixels, "raw", self.order)


def decode_avif(image: Image.Image) -> Pixels:
    """Decode the only frame of an AVIF file that Pillow has opened.

    `Image.load` would copy the pixels while the decoder still holds its own.
    """
    content, *_ = image._decoder.get_frame(0)
    import numpy as np  # after the peak: it takes 25 MB

    pixels = np.frombuffer(content, np.uint8).reshape(*reversed(image.size), len(image.mode))
    return Array(pixels, image.mode, image.mode, image.info)


def decode_webp(file: BinaryIO, size: Size, mode: str, info: dict[str | tuple[int, int], Any]) -> Pixels:
    """Decode a WebP file by OpenCV, without rotation, with the size, mode and `info` that Pillow has found."""
    import cv2  # here, because the import takes 0.1 s and 40 MB
    import numpy as np

    # Without a target array, OpenCV copies the picture in the end: 192 MB at 64 megapixels.
    place = np.empty((*reversed(size), len(mode)), np.uint8)
    try:
        pixels = cv2.imread(file.name, dst=place, flags=cv2.IMREAD_UNCHANGED)
    except cv2.error:  # its headers disagree about transparency
        del place
        pixels = cv2.imread(file.name, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise OSError("OpenCV does not decode it")
    mode, order = ("RGBA", "BGRA") if pixels.shape[2] == 4 else ("RGB", "BGR")
    return Array(pixels, mode, order, info)
