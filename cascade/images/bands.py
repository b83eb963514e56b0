"""Rotates, converts, crops and scales pictures in bands of rows, so that a large picture is never in memory twice.

Results are bit-identical to Pillow's for the whole picture.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

BAND_PIXELS = 2**21
# Lanczos takes 0.7 s for 64 megapixels. So pixels are averaged first, down to no less than this times the target size. By
# Pillow's documentation (`reducing_gap`), the difference is not visible.
AVERAGED_TO = 3
# Pixels of the result that Lanczos reads on each side, without half of the pixel itself, as in Pillow.
SUPPORT = 2.5
UPSIDE_DOWN = (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)
SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
FROM_THE_RIGHT = (Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)

Size = tuple[int, int]
Convert = Callable[[Image.Image], Image.Image]


class Pixels(Protocol):
    """The part of Pillow's `Image` that a stored picture must have."""

    @property
    def mode(self) -> str: ...

    @property
    def size(self) -> Size: ...

    @property
    def info(self) -> dict[str | tuple[int, int], Any]: ...

    @property
    def has_transparency_data(self) -> bool: ...

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image: ...


@dataclass(frozen=True)
class Upright:
    """A decoded picture and the rotation or flip that makes it upright.

    Attributes:
        stored: the pixels as decoded.
        turn: the rotation or flip; None: `stored` is upright.
    """

    stored: Pixels
    turn: Image.Transpose | None = None

    @property
    def size(self) -> Size:
        """(width, height) of the upright picture."""
        return turned(self.stored.size, self.turn)

    def rows(self, top: int, bottom: int) -> Image.Image:
        """Rows `top` to `bottom - 1` of the upright picture."""
        width, height = self.stored.size
        if self.turn in SIDEWAYS:
            left, right = (width - bottom, width - top) if self.turn in FROM_THE_RIGHT else (top, bottom)
            band = self.stored.crop((left, 0, right, height))
        else:
            first, last = (height - bottom, height - top) if self.turn in UPSIDE_DOWN else (top, bottom)
            band = self.stored.crop((0, first, width, last))
        return band if self.turn is None else band.transpose(self.turn)

    def joined(self, convert: Convert | None = None) -> Image.Image:
        """The whole upright picture, converted band by band. `stored` itself if nothing has to be done."""
        if self.turn is None and convert is None and isinstance(self.stored, Image.Image):
            return self.stored
        bands = bands_of(self.size)
        return joined(self.size, ((top, changed(self.rows(top, bottom), convert)) for top, bottom in bands))

    def scaled(self, needed: Size, convert: Convert | None = None) -> Image.Image:
        """Convert the picture, crop it evenly to the target's aspect ratio, and scale it.

        Works in bands if the picture shrinks to a sixth or less. Equals ``image.resize(needed, LANCZOS, box, AVERAGED_TO)``
        for the whole picture, in premultiplied colours if it has transparency.

        Args:
            needed: the target's (width, height), each at least 1.
            convert: converts a band to another mode, pixel by pixel; None: the mode stays.
        """
        width, height = self.size
        ratio = needed[0] / needed[1]
        left = (width - min(width, height * ratio)) / 2
        above = (height - min(height, width / ratio)) / 2
        box = (left, above, width - left, height - above)
        scales = ((box[2] - box[0]) / needed[0], (box[3] - box[1]) / needed[1])
        factors = (int(scales[0] / AVERAGED_TO) or 1, int(scales[1] / AVERAGED_TO) or 1)
        if factors == (1, 1):
            return self.joined(convert).resize(needed, Image.Resampling.LANCZOS, box)
        smaller, box = self._averaged(factors, scales, box, convert)
        scaled = smaller.resize(needed, Image.Resampling.LANCZOS, box)
        return scaled.convert("RGBA") if scaled.mode == "RGBa" else scaled

    def _averaged(
        self,
        factors: tuple[int, int],
        scales: tuple[float, float],
        box: tuple[float, float, float, float],
        convert: Convert | None,
    ) -> tuple[Image.Image, tuple[float, float, float, float]]:
        """Average blocks of `factors` pixels in the area that Lanczos reads.

        Returns the smaller picture, and `box` in its pixels.
        """
        left, above = (max(0, int(box[side] - SUPPORT * scales[side])) for side in (0, 1))
        right, below = (min(self.size[side], math.ceil(box[side + 2] + SUPPORT * scales[side])) for side in (0, 1))
        rows = max(BAND_PIXELS // self.size[0] // factors[1], 1) * factors[1]

        def averaged() -> Iterator[tuple[int, Image.Image]]:
            for top in range(above, below, rows):
                bottom = min(top + rows, below)
                band = premultiplied(changed(self.rows(top, bottom), convert))
                yield (top - above) // factors[1], band.reduce(factors, (left, 0, right, bottom - top))

        size = (-(-(right - left) // factors[0]), -(-(below - above) // factors[1]))
        part = (
            (box[0] - left) / factors[0],
            (box[1] - above) / factors[1],
            (box[2] - left) / factors[0],
            (box[3] - above) / factors[1],
        )
        return joined(size, averaged()), part


def bands_of(size: Size) -> Iterator[tuple[int, int]]:
    """The first row of each band, and the row after its last, for a picture of this (width, height)."""
    width, height = size
    rows = max(BAND_PIXELS // width, 1)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def joined(size: Size, bands: Iterator[tuple[int, Image.Image]]) -> Image.Image:
    """Join bands, all in one mode, into a picture of this (width, height). `bands` yields (first row, band)."""
    top, band = next(bands)
    whole = Image.new(band.mode, size)
    whole.paste(band, (0, top))
    for top, band in bands:
        whole.paste(band, (0, top))
    return whole


def turned(size: Size, turn: Image.Transpose | None) -> Size:
    """(width, height) of a stored picture when it is upright."""
    return size[::-1] if turn in SIDEWAYS else size


def changed(band: Image.Image, convert: Convert | None) -> Image.Image:
    return band if convert is None else convert(band)


def premultiplied(band: Image.Image) -> Image.Image:
    """Premultiply a band by its alpha, so that transparent pixels do not contribute their colours to averages."""
    return band.convert("RGBa") if band.mode == "RGBA" else band
