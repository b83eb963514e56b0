"""What the diffusion stages are trained to do."""

import pytest
import torch

from cascade.sampling import log_snr
from training.objective import AdaptiveLossWeight, P2Weight, keep_mask, loss_weight, pyramid_noise, sample_timesteps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_timesteps_cover_the_range_and_repeat() -> None:
    timesteps = sample_timesteps(20_000, generator())
    assert timesteps.min() >= 0.001
    assert timesteps.max() <= 1.0
    assert timesteps.mean().item() == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(timesteps, sample_timesteps(20_000, generator()), rtol=0, atol=0)


def test_p2_weight_is_one_over_k_plus_snr() -> None:
    timesteps = torch.tensor([0.01, 0.3, 0.5, 0.9, 1.0])
    snr = log_snr(timesteps).exp()
    torch.testing.assert_close(P2Weight()(timesteps), 1 / (1 + snr))
    torch.testing.assert_close(P2Weight(k=0.01, floor=0.1)(timesteps), 1 / (0.01 + snr) + 0.1)


def test_an_unknown_weight_is_named() -> None:
    with pytest.raises(ValueError, match="'snr'; it must be one of p2, adaptive"):
        loss_weight("snr")


def test_adaptive_weight_follows_the_loss_of_each_bucket() -> None:
    weight = AdaptiveLossWeight(momentum=0.5)
    timesteps = torch.tensor([0.2, 0.2, 0.8])
    for _ in range(40):
        weight.update(timesteps, torch.tensor([0.1, 0.3, 4.0]))
    torch.testing.assert_close(weight(timesteps), torch.tensor([5.0, 5.0, 0.25]), rtol=1e-4, atol=0)
    assert weight(torch.tensor([0.5])).item() == 1.0


def test_pyramid_noise_has_unit_variance_and_long_correlations() -> None:
    noise = pyramid_noise((64, 4, 64, 64), generator())
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    neighbours = (noise[..., :, 1:] * noise[..., :, :-1]).mean().item()
    white = pyramid_noise((64, 4, 64, 64), generator(), decay=0.0)
    assert abs((white[..., :, 1:] * white[..., :, :-1]).mean().item()) < 0.01
    assert neighbours > 0.2


@pytest.mark.parametrize("size", [(2, 1, 8, 24), (1, 4, 1, 1)])
def test_pyramid_noise_of_small_and_oblong_sizes(size: tuple[int, ...]) -> None:
    assert pyramid_noise(size, generator()).shape == size


def test_keep_mask_keeps_the_share_it_is_asked_for() -> None:
    assert keep_mask(20_000, 0.1, generator()).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not keep_mask(100, 0.0, generator()).any()
    assert keep_mask(100, 1.0, generator()).all()
