import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from cascade.networks.stage_a import MixingBlock, StageA

SMALL = {"embed_dim": 32, "bottleneck_blocks": 2, "num_vq_embeddings": 16, "levels": 3}


def make() -> StageA:
    torch.manual_seed(0)
    network = StageA(**SMALL).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_published_configuration():
    with torch.device("meta"):
        ours, reference = StageA(), PaellaVQModel()
    shapes = [{key: tensor.shape for key, tensor in net.state_dict().items()} for net in (ours, reference)]
    assert shapes[0] == shapes[1]
    fields = {name for name in reference.config if not name.startswith("_")}
    assert {name: ours.config[name] for name in fields} == {name: reference.config[name] for name in fields}


@torch.no_grad()
def test_same_as_diffusers():
    network, reference = make(), PaellaVQModel(**SMALL).eval()
    reference.load_state_dict(network.state_dict())
    pixels, latents = torch.rand(2, 3, 16, 24), torch.randn(2, 4, 3, 2)
    expected = reference.encode(pixels).latents
    torch.testing.assert_close(network.encode(pixels, scale=1.0), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network.encode(pixels), expected / 0.3764, atol=1e-5, rtol=1e-5)
    expected = reference.decode(latents * 0.43).sample
    torch.testing.assert_close(network.decode(latents, scale=0.43), expected, atol=1e-5, rtol=1e-5)


def test_training_reaches_every_weight_but_the_codebook():
    network = make().train()
    network(torch.rand(2, 3, 16, 16)).square().mean().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {"vquantizer.embedding.weight"}


def test_starts_with_closed_residual_branches():
    block = MixingBlock(8)
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(x), x)


def test_saved_and_loaded(tmp_path):
    network = make()
    network.save_pretrained(tmp_path)
    state = StageA.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="30x32; sides must be multiples of 8"):
        make().encode(torch.rand(1, 3, 30, 32))
