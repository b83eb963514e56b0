"""Scores of large pictures: how parts are counted, what a seam is, and which pictures are asked for."""

from collections.abc import Mapping

import pytest
import torch

from cascade import sizes
from cascade.stages import tiles
from cascade.stages.tiles import Tiles
from miniature import evaluate_large
from miniature.evaluate_large import CASES, parts, seam, squared
from miniature.icons import STYLES
from miniature.judge import Judge
from tests.miniature.test_evaluate import NAMES, drawings
from tests.tiny import make_cascade

COLOUR = torch.tensor([0.9, 0.1, 0.1])[:, None, None]


def picture(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """Boxes (top, left, height, width) on a grey gradient."""
    made = torch.linspace(0.5, 0.8, width).expand(3, height, width).clone()
    for top, left, rows, columns in boxes:
        made[:, top : top + rows, left : left + columns] = COLOUR
    return made


@pytest.mark.parametrize("size", [(256, 256), (256, 512), (512, 256)])
def test_parts_are_counted_whatever_the_size(size: tuple[int, int]) -> None:
    one, other, dot = (40, 40, 60, 60), (150, 150, 70, 50), (200, 40, 10, 10)
    assert parts(picture(*size)) == 0
    assert parts(picture(*size, one)) == 1
    assert parts(picture(*size, one, dot)) == 1
    assert parts(picture(*size, one, other)) == 2
    assert parts(picture(*size, one, (40, 100, 60, 30))) == 1, "they touch"
    assert squared(picture(*size)).shape == (3, max(size), max(size))


def test_a_seam_is_a_step_at_the_edge_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 112)
    divided = Tiles(160, 160)
    assert len(divided) == 4
    noise = torch.rand(3, 640, 640, generator=torch.Generator().manual_seed(0))
    assert seam(noise, divided) == pytest.approx(1, abs=0.03)
    at = 4 * divided.places[1][1]
    noise[:, :, at:] += 0.5
    assert seam(noise, divided) > 1.1


def test_every_size_is_asked_for_and_judged(components: Mapping[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of networks that have learned nothing; the true scenes have the objects that they should."""
    monkeypatch.setattr(evaluate_large, "CASES", ((64, 64, 42.67), (128, 64, 64.0)))
    monkeypatch.setattr(evaluate_large, "WHOLE_SIDE", 128)
    monkeypatch.setattr(tiles, "TILE", 24)
    monkeypatch.setattr(tiles, "OVERLAP", 8)
    monkeypatch.setattr(tiles, "GRID", 4)
    monkeypatch.setattr(evaluate_large, "GRID", 4)
    judge = Judge(drawings(), NAMES[:10], STYLES)
    found = evaluate_large.evaluate_large(make_cascade(components), judge, drawings(), 5, 2, 1)
    assert list(found.objects) == ["scenes of 64x64", "64x64 at 42.67", "scenes of 128x64", "128x64 at 64"]
    for name, scores in found.objects.items():
        assert {score: len(values) for score, values in scores.items()} == {"object first": 2, "one object": 2}
        if name.startswith("scenes"):
            assert scores == {"object first": [1, 1], "one object": [1, 1]}
    assert [each.size for each in found.pictures["128x64 at 64"]] == [(128, 64)] * 2
    assert [len(values) for values in found.tiles.values()] == [1, 1]


def test_the_cases_are_twice_the_miniature_s_size() -> None:
    assert {(width, height) for width, height, _ in CASES} == {(256, 256), (512, 512), (1024, 512)}
    assert all(sizes.DENSEST <= compression <= sizes.SPARSEST for _, _, compression in CASES)
