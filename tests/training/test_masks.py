"""Masks as people draw them: half boxes, some of all turned inside out."""

import pytest
import torch

from training.masks import blobs_and_strokes, boxes, random_masks


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_boxes_are_whole_and_lie_in_the_picture() -> None:
    masks = boxes(400, (40, 60), generator())
    assert masks.shape == (400, 1, 40, 60)
    rows, columns = masks.any(dim=3).squeeze(1), masks.any(dim=2).squeeze(1)
    # All of the rows and columns that a box has anything in belong to it, and they are neighbours.
    assert torch.equal(masks.squeeze(1), rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):
        starts = (lines[:, 1:] & ~lines[:, :-1]).sum(dim=1) + lines[:, 0]
        assert (starts == 1).all()
        share = lines.float().mean(dim=1)
        assert 0.15 <= share.min() < 0.25
        assert 0.85 < share.max() <= 0.95
        assert lines[:, 0].any()
        assert lines[:, -1].any()


def test_blobs_and_strokes_differ_from_one_another_and_cover_a_part() -> None:
    masks = blobs_and_strokes(400, (48, 48), generator())
    assert masks.dtype == torch.bool
    share = masks.float().mean(dim=(1, 2, 3))
    assert 0.2 < share.mean() < 0.4
    assert (share == 0).float().mean() < 0.05
    assert len({tuple(mask.flatten().tolist()) for mask in masks[:50]}) == 50


def test_masks_repeat_and_turn_inside_out() -> None:
    as_drawn = random_masks(64, (32, 48), generator(3), inverted=0)
    assert as_drawn.shape == (64, 1, 32, 48)
    assert torch.equal(as_drawn, random_masks(64, (32, 48), generator(3), inverted=0))
    assert torch.equal(random_masks(64, (32, 48), generator(3), inverted=1), ~as_drawn)
    some = random_masks(2000, (8, 8), generator(), inverted=0.25) ^ random_masks(2000, (8, 8), generator(), inverted=0)
    assert some.flatten(1).all(dim=1).float().mean().item() == pytest.approx(0.25, abs=0.04)
