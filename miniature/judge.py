"""Tell what is in a picture without any trained network: the nearest reference drawing, once the background is removed.

The background is a plane of colour fitted to the picture's border; what differs from it is the object; its tight crop is
compared, pixel by pixel at 32x32, with every reference drawing as it would look on the same background.
Pictures are float32 (n, 3, S, S) in 0..1 throughout.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.scenes import COLOURS

_SIDE = 32
_BORDER = 0.03
"""Width of the border that shows nothing but background; objects keep `scenes.MARGIN` (0.04) away from the edge."""
_DIFFERENT = 0.10
"""Colour distance (RGB in 0..1, Euclidean) from which a pixel belongs to the object."""
_MASK_WEIGHT = 0.3
"""Weight of the silhouettes' difference beside the colours'."""


def background_plane(pictures: Tensor) -> Tensor:
    """The plane `a + b x + c y`, a channel, that fits each picture's border best; border pixels far from it are left out."""
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
    """The names in `COLOURS` nearest to RGB `colours`, float (n, 3) in 0..1."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=colours.device) / 255
    names = list(COLOURS)
    return [names[i] for i in torch.cdist(colours, palette).argmin(1).tolist()]


def background_colours(pictures: Tensor, way: str | None = None) -> list[tuple[str, str]]:
    """Names of each background's colours at the start and end of a gradient along `way` (of `GRADIENT_WAYS`).

    With `way` None the background counts as plain: both names are that of the border's median colour.
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


def _crops(difference: Tensor, region: Tensor | None = None) -> Tensor:
    """Tight square crops of what differs from the background: (n, 4, 32, 32), the difference and the silhouette.

    `difference` is (n, 3, S, S), picture less background. Of `region`, bool (n, S, S), only the inside counts.
    """
    side = difference.shape[-1]
    # A blur of three pixels keeps lone wrong pixels out of the silhouette.
    smooth = F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    mask = smooth.norm(dim=1) > _DIFFERENT
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
    """The two regions, bool (n, S, S), either side of the emptiest column (or row) near the middle."""
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
    """Names the objects in pictures by the nearest of the reference drawings.

    `drawings`, `names` and `styles` are those of `load_drawings`.
    """

    def __init__(self, drawings: Tensor, names: Sequence[str], styles: Sequence[str]):
        self.names, self.styles = list(names), list(styles)
        reduced = [F.interpolate(part.float() / 255, (_SIDE, _SIDE), mode="area") for part in drawings.split(256)]
        self._references = _soften(torch.cat(reduced)).unflatten(0, (len(self.names), len(self.styles)))

    @property
    def device(self) -> torch.device:
        """Where the drawings lie, and pictures are to be."""
        return self._references.device

    def distances(self, picture: Tensor, style: str | None = None, relation: str | None = None) -> list[Tensor]:
        """How far the object, or each of the two objects, of one picture (3, S, S) is from every name: float (names,) each.

        `style` limits the references to one style. `relation`, of `scenes.RELATIONS`, says that the picture shows two objects
        and where; they come in the order in which the relation names them.
        """
        plane = background_plane(picture[None])
        difference = picture[None] - plane
        regions: list[Tensor | None] = [None]
        if relation is not None:
            first, second = _halves(difference, relation not in ("above", "below"))
            regions = [second, first] if relation in ("right of", "below") else [first, second]
        references = self._references
        if style is not None:
            references = references[:, self.styles.index(style), None]
        results = []
        for region in regions:
            where = torch.ones_like(plane[:, 0]) if region is None else region.float()
            ground = (plane * where[:, None]).sum((2, 3))[0] / where.sum()
            seen = _soften(_crops(difference, region))[0]
            # Premultiplied colour less alpha times background: a reference's own difference from that background.
            colours = references[:, :, :3] - references[:, :, 3:] * ground[:, None, None] - seen[:3]
            silhouettes = references[:, :, 3] - seen[3]
            distance = colours.square().sum((2, 3, 4)) + _MASK_WEIGHT * silhouettes.square().sum((2, 3))
            results.append(distance.min(1).values)
        return results

    def ranked(self, picture: Tensor, style: str | None = None, relation: str | None = None) -> list[list[str]]:
        """All names, nearest first, for the object or each of the two objects of one picture; as `distances`."""
        distances = self.distances(picture, style, relation)
        return [[self.names[i] for i in distance.argsort().tolist()] for distance in distances]


def _soften(drawings: Tensor) -> Tensor:
    """A blur of three of the 32 pixels: an object a little out of place or out of focus stays the nearest."""
    return F.avg_pool2d(drawings, 3, 1, 1)
