"""Sheets of samples, also of data that has fewer held-out pictures than a sheet has room for."""

import numpy as np
import torch

from training.pictures import grid


def test_grid() -> None:
    red, small, blue = torch.zeros(3, 3, 8, 8), torch.ones(2, 3, 4, 4), torch.zeros(1, 3, 8, 8)
    red[:, 0], blue[:, 2] = 1, 1
    pixels = np.asarray(grid([red, small, blue[:0], blue]))
    assert pixels.shape == (24, 24, 3)
    assert (pixels[:8] == (255, 0, 0)).all()
    assert (pixels[8:16, :16] == 255).all()
    assert (pixels[8:16, 16:] == 0).all()
    assert (pixels[16:, :8] == (0, 0, 255)).all()
    assert (pixels[16:, 8:] == 0).all()
