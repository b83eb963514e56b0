"""The semantic encoder and the previewer: shapes, sizes, and other configurations than the published ones."""

import pytest
import torch

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer

SMALL = {
    "stem_channels": 8,
    "channels": (8, 12, 16),
    "repeats": (1, 2, 2),
    "expansions": (1, 2, 4),
    "strides": (2, 2, 4),
    "fused_stages": 2,
    "head_channels": 32,
    "latent_channels": 6,
}


def test_published_sizes():
    with torch.device("meta"):
        encoder, previewer = SemanticEncoder(), Previewer()
    backbone = sum(parameter.numel() for parameter in encoder.backbone.parameters())
    assert backbone == 20_177_488
    assert sum(parameter.numel() for parameter in encoder.mapper.parameters()) == 1280 * 16
    assert sum(parameter.numel() for parameter in previewer.parameters()) == 3_979_651


@torch.no_grad()
def test_narrow_encoder():
    network = SemanticEncoder(**SMALL).eval()
    assert network(torch.rand(2, 3, 64, 33)).shape == (2, 6, 2, 2)


def test_encoder_trains():
    network = SemanticEncoder(**SMALL).train()
    latents = network(torch.rand(4, 3, 64, 64))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    latents.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_encoder_of_unequal_lists():
    with pytest.raises(ValueError, match=r"lengths \[2, 3\]"):
        SemanticEncoder(**(SMALL | {"strides": (1, 2)}))


@pytest.mark.parametrize("network", [SemanticEncoder(**SMALL), Previewer(6, 16, 3)], ids=["encoder", "previewer"])
def test_saved_and_loaded(network, tmp_path):
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


@torch.no_grad()
def test_narrow_previewer():
    assert Previewer(6, 16, 3).eval()(torch.randn(2, 6, 3, 2)).shape == (2, 3, 24, 16)
