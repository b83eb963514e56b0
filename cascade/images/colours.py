"""Converts pictures of any mode to RGB: 8 bits per channel, sRGB, transparent parts composited onto a background.

Works in bands of rows, so that memory holds the picture and its result, but no third copy.
"""

import io
import logging
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageCms

from cascade.images.bands import Pixels, Upright

logger = logging.getLogger(__name__)

GREY_MODES = ("1", "L", "LA", "La")
SRGB = ImageCms.createProfile("sRGB")
# Pillow's mode for lcms's input, by a profile's colour space.
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


class PictureError(ValueError):
    """A picture cannot be read. The message is one sentence that begins with the picture's name."""


class DamagedError(PictureError):
    """A picture's pixels cannot be decoded."""


def to_rgb(image: Image.Image, name: str = "The image", background: str | None = "white") -> Image.Image:
    """Convert a picture of any mode to RGB, without metadata that would change its colours.

    Args:
        image: the picture. Its colour profile is applied, so the result is sRGB. A profile that is damaged or for another kind
            of picture is ignored and logged.
        name: the picture's name in errors and logs.
        background: colour onto which transparent parts are composited; None: they stay transparent.

    Returns:
        RGB; RGBA if it has transparency and `background` is None. The image itself if nothing has to be changed.

    Raises:
        PictureError: it has 32 bits per channel, whose range is unknown.
    """
    image.load()
    return Conversion.of(image, name, background).whole(image)


@dataclass(frozen=True)
class Conversion:
    """The conversion of one picture to RGB, whole or in bands.

    Attributes:
        greys: for 16-bit pictures, the 8-bit grey for each value from 0 to 65535.
        clear: for 16-bit pictures, the transparent value.
        transform: from the picture's colours, in `device_mode`, to sRGB; None: they are sRGB.
        device_mode: the transform's input mode.
        background: colour behind transparent parts; None: they stay transparent.
    """

    greys: list[int] | None
    clear: int | None
    transform: ImageCms.ImageCmsTransform | None
    device_mode: str
    background: str | None

    @classmethod
    def of(cls, image: Pixels, name: str, background: str | None) -> "Conversion":
        """The conversion for a decoded picture; see `to_rgb`.

        Raises:
            PictureError: it has 32 bits per channel.
        """
        if image.mode in ("I", "F"):
            raise PictureError(f"{name} has 32 bits per channel; 8 or 16 are read.")
        greys = clear = None
        if image.mode.startswith("I;16"):
            greys, clear = greys_of(image), image.info.get("transparency")
        transform, device_mode = transform_of(image, name)
        return cls(greys, clear, transform, device_mode, background)

    def whole(self, image: Image.Image) -> Image.Image:
        """Convert a whole picture. Returns the picture itself if nothing has to be changed."""
        if image.mode == "RGB" and not image.has_transparency_data and self.transform is None:
            return image
        return Upright(image).joined(self.convert)

    def convert(self, band: Image.Image) -> Image.Image:
        alpha = None
        if self.greys is not None:
            wide = band.convert("I")
            if self.clear is not None:
                alpha = wide.point([0 if value == self.clear else 255 for value in range(65536)], "L")
            band = wide.point(self.greys, "L")
        elif band.has_transparency_data:
            band = band.convert("RGBA")
            alpha = band.getchannel("A")
        if self.transform is not None:
            if band.mode != self.device_mode:
                band = band.convert("RGB").convert(self.device_mode)  # L keeps the value of three equal channels
            band = ImageCms.applyTransform(band, self.transform)
        if alpha is None or (self.background is not None and alpha.getextrema() == (255, 255)):
            return band.convert("RGB")
        if band.mode != "RGBA":
            band = band.convert("RGB")
            band.putalpha(alpha)
        if self.background is None:
            return band
        return Image.alpha_composite(Image.new("RGBA", band.size, self.background), band).convert("RGB")


def greys_of(image: Pixels) -> list[int]:
    """The 8-bit grey for each value of a 16-bit grey picture. Pillow would clip at 255.

    Applies a TIFF file's tags for bits per sample and inverted greys, which Pillow ignores in this mode.
    """
    tags = getattr(image, "tag_v2", {})
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,))[:1]
    white = 2**bits - 1
    greys = [round(min(value, white) * 255 / white) for value in range(65536)]
    inverted = tags.get(PHOTOMETRIC, 1) == WHITE_IS_ZERO
    return [255 - grey for grey in greys] if inverted else greys


def transform_of(image: Pixels, name: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transform from a picture's colours to sRGB and its input mode. The transform is None if they are sRGB already."""
    if image.mode == "LAB":
        return ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB"), "LAB"
    content = image.info.get("icc_profile")
    if not content:
        return None, "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space.strip()
        mode = PROFILE_MODES.get(space)
        grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and not grey):
            raise ValueError(f"it is for {space}, and the picture is {image.mode}")
        transform = ImageCms.buildTransform(
            profile,
            SRGB,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except Exception as error:  # lcms and Pillow raise various errors for damaged profiles
        logger.warning("The colour profile of %s is ignored: %s.", name, str(error).rstrip(".") or type(error).__name__)
        return None, "RGB"
    return (None, "RGB") if changes_nothing(transform, mode) else (transform, mode)


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform's input is sRGB, too: no colour changes by more than rounding, 1 of 255."""
    if mode == "CMYK":
        return False
    if mode == "L":
        colours = Image.linear_gradient("L")
    else:
        levels = range(0, 256, 15)
        values = bytes(value for red in levels for green in levels for blue in levels for value in (red, green, blue))
        colours = Image.frombytes("RGB", (len(levels), len(levels) ** 2), values)
    difference = ImageChops.difference(ImageCms.applyTransform(colours, transform), colours.convert("RGB"))
    return max(high for _, high in difference.getextrema()) <= 1
