"""Sheets of samples, also of data that has fewer held-out pictures than a sheet has room for; how near pictures are."""

import numpy as np
import pytest
import torch

from training.pictures import grid, psnr, ssim


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


def test_psnr_is_the_mean_over_pictures_of_decibels() -> None:
    true = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(true + errors, true) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert psnr(true, true) == pytest.approx(100)


def test_ssim_follows_the_formula_in_every_window() -> None:
    made, true = torch.rand(2, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    values = []
    for channel in range(2):
        for row in range(3):
            for column in range(2):
                window = (0, channel, slice(row, row + 7), slice(column, column + 7))
                a, b = made[window].flatten(), true[window].flatten()
                covariance = torch.cov(torch.stack([a, b]), correction=0)
                values.append(
                    (2 * a.mean() * b.mean() + 1e-4)
                    / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                    * (2 * covariance[0, 1] + 9e-4)
                    / (covariance.trace() + 9e-4)
                )
    assert ssim(made, true) == pytest.approx(torch.stack(values).mean().item(), abs=1e-5)
    assert ssim(made, made) == pytest.approx(1)
