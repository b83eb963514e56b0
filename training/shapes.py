"""The picture size of each training step: mostly the native one, and regularly another, so that networks learn all sizes."""

from dataclasses import dataclass
from itertools import pairwise

from cascade.sizes import Size


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
