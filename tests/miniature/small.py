"""The smallest training on drawings: a few of them, and what its configuration has besides that of `tests.training.small`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from miniature import icons
from miniature.icons import STYLES, IconObject, pack_drawings

DRAWN = """
data.source = "miniature.dataset:Drawings"
data.scenes = 64
data.unseen = 64
data.seed = 0
controlnet_canny.data = { scenes = 32, unsaid = 0.5 }
ip_adapter.data = { nameless = 0.3, others = 0.2 }
"""


def ellipse(radius: int = 9, hue: int = 0, light: int = 50) -> str:
    """An SVG drawing; ``radius`` is its horizontal one, ``hue`` and ``light`` its colour's."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">'
        f'<ellipse cx="12" cy="12" rx="{radius}" ry="9" fill="hsl({hue}, 80%, {light}%)"/></svg>'
    )


@contextmanager
def quick_packing() -> Iterator[None]:
    """A context in which packed drawings have larger files, and take a tenth of the time."""
    with mock.patch.object(icons, "EFFORT", 0):
        yield


def pack(names: Sequence[str], file: Path, styles: Sequence[str] = STYLES) -> Path:
    """Packs drawings of objects that differ in shape and colour, and their styles in lightness."""
    sets = [
        {name: ellipse(4 + index % 6, 60 * index, 30 + 20 * style) for index, name in enumerate(names)}
        for style in range(len(styles))
    ]
    with quick_packing():
        pack_drawings([IconObject(name, (name,) * len(styles)) for name in names], sets, file, tuple(styles))
    return file
