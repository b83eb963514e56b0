"""Names the objects in a picture, without any trained network: by the nearest reference drawing.

The background is a plane of colour, fitted to the picture's border. What differs from it is the object. Its tight crop is
compared, pixel by pixel at 32x32, with every reference drawing on the same background. All pictures are float32 (n, 3, S, S) in
0..1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenes import COLOURS

_SIDE = 32
_BORDER = 0.03
"""Width of the border that shows only background, as a share of the side; objects keep `scenes.MARGIN` (0.04) from the edge."""
_DIFFERENT = 0.10
"""Colour distance (RGB in 0..1, Euclidean) above which a pixel belongs to the object."""
_MASK_WEIGHT = 0.3
"""Weight of the difference of silhouettes; that of colours is 1."""


def background_plane(pictures: Tensor) -> Tensor:
    """The plane ``a + b x + c y``, for each channel, that fits each picture's border best; outliers count little."""
    n, _, _, side = pictures.shape
    at = torch.linspace(-1, 1, side, device=pictures.device)
    y, x = torch.meshgrid(at, at, indexing="ij")
    design = torch.stack([torch.ones_like(x), x, y], -1)
    width = max(2, round(_BORDER * side))
    inside = slice(width, side - width)
    border = torch.ones(side, side, dtype=torch.bool, device=pictures.device)
    border[inside, inside] = False
    points, values = design[border], pictures[:, :, border].transpose(1, 2)
    centre = values.median(1, keepdim=True).values
    weights = torch.ones(values.shape[:2], device=pictures.device)
    for _ in range(4):
        weighted = points * weights[..., None]
        coefficients = torch.linalg.solve(
            weighted.transpose(1, 2) @ points + 1e-3 * torch.eye(3, device=pictures.device),
            weighted.transpose(1, 2) @ (values - centre),
        )
        error = (values - centre - points @ coefficients).norm(dim=-1)
        weights = 1 / (1 + (error / 0.05) ** 2)
    return (design.reshape(-1, 3) @ coefficients + centre).transpose(1, 2).reshape(n, 3, side, side)


def nearest_colours(colours: Tensor) -> list[str]:
    """The names in `COLOURS` that are nearest to RGB ``colours``, float (n, 3) in 0..1."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=colours.device) / 255
    names = list(COLOURS)
    return [names[i] for i in torch.cdist(colours, palette).argmin(1).tolist()]


def background_colours(pictures: Tensor, way: str | None = None) -> list[tuple[str, str]]:
    """The names of each background's colours, at the start and the end of a gradient along ``way`` (of `GRADIENT_WAYS`).

    If ``way`` is None, the background is plain, and both names are that of the border's median colour.
    """
    side = pictures.shape[-1]
    width = max(2, round(_BORDER * side))
    if way is None:
        rows = [pictures[:, :, :width], pictures[:, :, -width:]]
        columns = [pictures[..., :width].transpose(2, 3), pictures[..., -width:].transpose(2, 3)]
        colours = torch.cat(rows + columns, 2).flatten(2).median(-1).values
        return [(name, name) for name in nearest_colours(colours)]
    along = pictures if way == "top to bottom" else pictures.transpose(2, 3)
    ends = (along[:, :, :width], along[:, :, -width:])
    start, end = (nearest_colours(part.flatten(2).median(-1).values) for part in ends)
    return list(zip(start, end, strict=True))


def silhouettes(difference: Tensor) -> Tensor:
    """Where pictures differ from their backgrounds: bool (n, S, S), of ``difference`` (n, 3, S, S)."""
    # A blur of three pixels keeps single wrong pixels out.
    smooth = F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    return smooth.norm(dim=1) > _DIFFERENT


def _crops(difference: Tensor, region: Tensor | None = None) -> Tensor:
    """Tight square crops of the object: (n, 4, 32, 32), its difference from the background and its silhouette.

    ``difference`` (n, 3, S, S) is the picture minus the background. Only the inside of ``region``, bool (n, S, S), counts.
    """
    side = difference.shape[-1]
    mask = silhouettes(difference)
    if region is not None:
        mask &= region
    enough = max(1, side // 100)
    low, high = [], []
    for axis in (1, 2):
        filled = mask.sum(axis) >= enough
        index = torch.arange(side, device=mask.device)
        low.append(torch.where(filled, index, side).min(1).values)
        high.append(torch.where(filled, index, -1).max(1).values + 1)
    left, top, right, bottom = (v.float() for v in (low[0], low[1], high[0], high[1]))
    empty = (right <= left) | (bottom <= top)
    left, top = left.masked_fill(empty, 0), top.masked_fill(empty, 0)
    right, bottom = right.masked_fill(empty, side), bottom.masked_fill(empty, side)
    length = torch.maximum(right - left, bottom - top)
    fine = 4 * _SIDE
    at = (torch.arange(fine, device=mask.device) + 0.5) / fine - 0.5
    x = ((left + right) / 2)[:, None] + at * length[:, None]
    y = ((top + bottom) / 2)[:, None] + at * length[:, None]
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1) / side * 2 - 1
    layers = torch.cat([difference * mask[:, None], mask[:, None].float()], 1)
    cropped = F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(cropped, fine // _SIDE)


def _halves(difference: Tensor, sideways: bool) -> tuple[Tensor, Tensor]:
    """The two regions, bool (n, S, S), on either side of the emptiest column (or row) near the middle."""
    mask = (difference.norm(dim=1) > _DIFFERENT).float()
    side = mask.shape[-1]
    profile = mask.sum(1 if sideways else 2)
    near = slice(round(0.35 * side), round(0.65 * side))
    index = torch.arange(side, device=mask.device)
    # Of equally empty columns, the one nearest to the middle.
    cost = profile[:, near] + 0.01 * (index[near] - side / 2).abs()
    cut = cost.argmin(1) + near.start
    first = (index[None] < cut[:, None])[:, None, :] if sideways else (index[None] < cut[:, None])[:, :, None]
    first = first.expand(-1, side, side)
    return first, ~first


class Judge:
    """Names the objects in pictures by the nearest reference drawing.

    ``drawings``, ``names`` and ``styles`` are those of `icons.load_drawings`.
    """

    def __init__(self, drawings: Tensor, names: Sequence[str], styles: Sequence[str]):
        self.names, self.styles = list(names), list(styles)
        reduced = [F.interpolate(part.float() / 255, (_SIDE, _SIDE), mode="area") for part in drawings.split(256)]
        self._references = _soften(torch.cat(reduced)).unflatten(0, (len(self.names), len(self.styles)))

    @property
    def device(self) -> torch.device:
        """The device of the drawings, where pictures must be too."""
        return self._references.device

    def distances(self, picture: Tensor, style: str | None = None, relation: str | None = None) -> list[Tensor]:
        """The distances of the objects in one picture (3, S, S) from every name: float (names,) for each object.

        Args:
            style: limits the references to one style; None: the nearest of all styles counts.
            relation: of `scenes.RELATIONS`, if the picture shows two objects. They come in the order in which it names them.
        """
        chosen = slice(None) if style is None else [self.styles.index(style)]
        return [each[:, chosen].min(1).values for each in self.drawing_distances(picture, relation)]

    def drawing_distances(self, picture: Tensor, relation: str | None = None) -> list[Tensor]:
        """The distances of the objects in one picture (3, S, S) from every drawing: float (names, styles) for each object.

        relation: as `distances` has it.
        """
        plane = background_plane(picture[None])
        difference = picture[None] - plane
        regions: list[Tensor | None] = [None]
        if relation is not None:
            first, second = _halves(difference, relation not in ("above", "below"))
            regions = [second, first] if relation in ("right of", "below") else [first, second]
        references = self._references
        results = []
        for region in regions:
            where = torch.ones_like(plane[:, 0]) if region is None else region.float()
            ground = (plane * where[:, None]).sum((2, 3))[0] / where.sum()
            seen = _soften(_crops(difference, region))[0]
            # Premultiplied colour minus alpha times background: the difference of a reference on that background.
            colours = references[:, :, :3] - references[:, :, 3:] * ground[:, None, None] - seen[:3]
            silhouettes = references[:, :, 3] - seen[3]
            results.append(colours.square().sum((2, 3, 4)) + _MASK_WEIGHT * silhouettes.square().sum((2, 3)))
        return results

    def ranked(self, picture: Tensor, style: str | None = None, relation: str | None = None) -> list[list[str]]:
        """All names, nearest first, for each object in one picture; arguments as `distances`."""
        distances = self.distances(picture, style, relation)
        return [[self.names[i] for i in distance.argsort().tolist()] for distance in distances]


def _soften(drawings: Tensor) -> Tensor:
    """Blurs by three of the 32 pixels, so that a small shift or blur of an object changes its distances little."""
    return F.avg_pool2d(drawings, 3, 1, 1)
