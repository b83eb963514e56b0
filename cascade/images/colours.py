"""Pictures of any mode become RGB: 8 bits a channel, in sRGB, what is transparent laid on a colour.

Works in bands of rows, so that beside a picture and what it becomes there is never a third one of that size.
"""

import io
import logging
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageCms

from cascade.images.bands import Pixels, Upright

logger = logging.getLogger(__name__)

GREY_MODES = ("1", "L", "LA", "La")
SRGB = ImageCms.createProfile("sRGB")
# The mode in which lcms takes the colours of a profile's colour space.
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0


class PictureError(ValueError):
    """A picture cannot be read. The message is one sentence, which begins with what the picture is called."""


class DamagedError(PictureError):
    """Its pixels cannot be decoded."""


def to_rgb(image: Image.Image, name: str = "The image", background: str | None = "white") -> Image.Image:
    """A picture of any mode in RGB, without metadata that would change its colours.

    Args:
        image: its colour profile is applied, if it has one: what comes back is sRGB. A profile that is broken or of
            another kind of picture is ignored, which is logged.
        name: what errors and logs call it.
        background: what is transparent is laid on this colour; None: it stays transparent.

    Returns:
        RGB; RGBA if it has transparency and no background. The image itself if nothing has to be changed.

    Raises:
        PictureError: it has 32 bits a channel, of which nothing says what is white.
    """
    image.load()
    return Conversion.of(image, name, background).whole(image)


@dataclass(frozen=True)
class Conversion:
    """How one picture becomes RGB, whole or in bands.

    Attributes:
        greys: of 16 bits: the 8 bits of every value from 0 to 65535.
        clear: of 16 bits: the value that is transparent.
        transform: from the picture's colours, in `device_mode`, to sRGB; None: they are sRGB.
        background: None: what is transparent stays so.
    """

    greys: list[int] | None
    clear: int | None
    transform: ImageCms.ImageCmsTransform | None
    device_mode: str
    background: str | None

    @classmethod
    def of(cls, image: Pixels, name: str, background: str | None) -> "Conversion":
        """The conversion of a decoded picture; see `to_rgb`.

        Raises:
            PictureError: it has 32 bits a channel.
        """
        if image.mode in ("I", "F"):
            raise PictureError(f"{name} has 32 bits a channel; 8 or 16 are read.")
        greys = clear = None
        if image.mode.startswith("I;16"):
            greys, clear = greys_of(image), image.info.get("transparency")
        transform, device_mode = transform_of(image, name)
        return cls(greys, clear, transform, device_mode, background)

    def whole(self, image: Image.Image) -> Image.Image:
        """All of a picture; itself if nothing has to be changed."""
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
                band = band.convert("RGB").convert(self.device_mode)  # to L, from equal channels, it loses nothing
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
    """The 8 bits of every value of a grey picture of 16 bits. Pillow would clip at 255.

    A TIFF file's tags say what else the values may mean, and Pillow heeds them in other modes only.
    """
    tags = getattr(image, "tag_v2", {})
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,))[:1]
    white = 2**bits - 1
    greys = [round(min(value, white) * 255 / white) for value in range(65536)]
    inverted = tags.get(PHOTOMETRIC, 1) == WHITE_IS_ZERO
    return [255 - grey for grey in greys] if inverted else greys


def transform_of(image: Pixels, name: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """How a picture's colours become sRGB, and the mode in which they are taken; None if they are sRGB already."""
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
    except Exception as error:  # lcms's, and whatever Pillow stumbles over
        logger.warning("The colour profile of %s is ignored: %s.", name, str(error).rstrip(".") or type(error).__name__)
        return None, "RGB"
    return (None, "RGB") if changes_nothing(transform, mode) else (transform, mode)


def changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform is one from sRGB, whatever its profile is called: no colour changes by more than rounding."""
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
