"""The sizes of training pictures.

`Shapes` gives each step a size: mostly the native one, and regularly another, so that networks learn all sizes. `bucket_size`
gives each picture a size of its own shape.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from cascade.sizes import MULTIPLE, SMALLEST, WHOLE, Size

STEEPEST = 4.0
"""Largest ratio of a bucket's sides."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of training pictures, (height, width) in pixels.

    Attributes:
        native: the size of most steps.
        others: further sizes, which take turns; none: all steps have the native size.
        every: one step in so many has another size.
    """

    native: Size
    others: tuple[Size, ...] = ()
    every: int = 16

    def at(self, index: int) -> Size:
        """The size of micro-batch ``index``. It depends on nothing else, so processes agree, and training resumes exactly."""
        if not self.others or index % self.every != self.every - 1:
            return self.native
        return self.others[index // self.every % len(self.others)]

    def batch_size(self, size: Size, native_batch: int) -> int:
        """How many pictures of ``size`` have as many pixels as ``native_batch`` native ones; at least 1."""
        return max(1, native_batch * self.native[0] * self.native[1] // (size[0] * size[1]))

    def split(self, count: int) -> dict[Size, range]:
        """Divides ``count`` pictures, at least 1, among the sizes: the others share an eighth, the native one has the rest.

        Each size has at least one picture; if there are fewer pictures than sizes, some serve several sizes.
        """
        each = max(1, count // 8 // len(self.others)) if self.others else 0
        starts = {size: index * each % count for index, size in enumerate(self.others)}
        parts = {size: range(start, start + each) for size, start in starts.items()}
        first = each * len(self.others)
        return {self.native: range(first if first < count else 0, count), **parts}


def shares(indices: range, count: int) -> list[range]:
    """Divides at least one index into ``count`` equal shares, each of at least one; few indices serve several shares."""
    bounds = [indices.start + len(indices) * i // count for i in range(count + 1)] if count else []
    return [range(first, max(last, first + 1)) for first, last in pairwise(bounds)]


def bucket_size(width: int, height: int, resolution: int) -> Size:
    """The (height, width) at which a picture is trained on: its shape, with about the area of a square.

    Sides are multiples of a 16th of the square's side, 64 pixels for 1024, so that pictures of similar shapes share a bucket.
    Pictures beyond 4:1 are cropped to it.
    """
    ratio = min(max(width / height, 1 / STEEPEST), STEEPEST)
    step = max(MULTIPLE, resolution // 16 // MULTIPLE * MULTIPLE)
    sides = (resolution / math.sqrt(ratio), resolution * math.sqrt(ratio))
    least, most = math.ceil(SMALLEST / step) * step, WHOLE // step * step
    rows, columns = (min(max(round(side / step) * step, least), most) for side in sides)
    return rows, columns
