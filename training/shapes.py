"""Which picture size a training step has: mostly the native one, and at times another, so that the networks learn them all."""

from dataclasses import dataclass

from cascade.sizes import Size


@dataclass(frozen=True)
class Shapes:
    """The sizes of training pictures, (height, width) in pixels.

    Attributes:
        native: of most steps.
        others: take turns, at every ``every``-th step; none: all steps have the native size.
        every: steps from one other size to the next.
    """

    native: Size
    others: tuple[Size, ...] = ()
    every: int = 16

    def at(self, index: int) -> Size:
        """The size of micro-batch ``index``. A function of the index alone: processes agree, and training resumes exactly."""
        if not self.others or index % self.every != self.every - 1:
            return self.native
        return self.others[index // self.every % len(self.others)]

    def batch_size(self, size: Size, native_batch: int) -> int:
        """How many pictures of ``size`` have as many pixels as ``native_batch`` native ones; at least 1."""
        return max(1, native_batch * self.native[0] * self.native[1] // (size[0] * size[1]))

    def split(self, count: int) -> dict[Size, range]:
        """``count`` pictures, at least 1, divided among the sizes: ``others`` share an eighth of them, the rest is native.

        Each size has a picture at least; fewer pictures than sizes serve several.
        """
        each = max(1, count // 8 // len(self.others)) if self.others else 0
        starts = {size: index * each % count for index, size in enumerate(self.others)}
        parts = {size: range(start, start + each) for size, start in starts.items()}
        first = each * len(self.others)
        return {self.native: range(first if first < count else 0, count), **parts}
