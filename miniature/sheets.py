"""Many pictures on one page."""

import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

# With captions: pixels of a picture's side and between pictures. GitHub shows README.md some 830 pixels wide, half as wide as
# the widest page.
SIDE, GAP, FONT_SIZE, LINE = 256, 20, 21, 25
CHARACTERS = 24  # of a line


def sheet(pictures: Sequence[Image.Image], columns: int, captions: Iterable[str] | None = None) -> Image.Image:
    """One picture of many, row by row on white.

    Args:
        pictures: equally large, at least one.
        columns: pictures in a row.
        captions: one a picture, below it; pictures are then resized to 256x256 pixels, and there is space between them. None:
            they are pasted as they are, without space.
    """
    if captions is None:
        return _page([(picture, []) for picture in pictures], columns, pictures[0].size, gap=0, below=0)
    lines = [textwrap.wrap(caption, width=CHARACTERS) for caption in captions]
    resized = [picture.resize((SIDE, SIDE), Image.Resampling.NEAREST) for picture in pictures]
    below = LINE * max(map(len, lines)) + GAP // 2
    return _page(list(zip(resized, lines, strict=True)), columns, (SIDE, SIDE), gap=GAP, below=below)


def _page(
    cells: Sequence[tuple[Image.Image, list[str]]], columns: int, size: tuple[int, int], *, gap: int, below: int
) -> Image.Image:
    font = ImageFont.load_default(size=FONT_SIZE)
    width, height = size[0] + gap, size[1] + below + gap
    page = Image.new("RGB", (columns * width - gap, -(-len(cells) // columns) * height - gap), "white")
    pen = ImageDraw.Draw(page)
    for index, (picture, lines) in enumerate(cells):
        row, column = divmod(index, columns)
        page.paste(picture, (column * width, row * height))
        middle, top = column * width + size[0] / 2, row * height + size[1] + 6
        for number, line in enumerate(lines):
            pen.text((middle, top + LINE * number), line, "black", font, anchor="ma")
    return page
