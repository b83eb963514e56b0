"""The IP-Adapter on a GPU: its attention by the kernels, from graphs, and trained at the published size for a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade import kernels
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.networks.ip_adapter import IPAdapter, attention_blocks, image_tokens
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.stages.prior import AdapterImage, images_by_step
from tests.components import shuffle
from tests.gpu.full_size import make_unet, published_config, random_conditions

pytestmark = pytest.mark.usefixtures("exact_float32")
SMALL = {"width": 256, "height": 256, "steps_prior": 4, "steps_decoder": 2}


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_kernel_attends_to_few_tokens_alone(tokens: int, dtype: torch.dtype) -> None:
    """As plain torch does in float32, with queries that are a part of q, k and v."""
    generator = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(4, 576, 3 * 2048, generator=generator, device="cuda").to(dtype)
    query = fused.chunk(3, dim=-1)[0]
    key, value = (torch.randn(4, 32, tokens, 64, generator=generator, device="cuda").to(dtype) for _ in range(2))
    made = kernels.load("triton").attention(query, None, None, key, value)
    expected = kernels.load("plain").attention(query.float(), None, None, key.float(), value.float())
    assert (made.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.fixture(scope="module")
def stage_c() -> StableCascadeUNet:
    config = published_config("prior")
    return make_unet(config, latent_size=(24, 24), semantic_size=(24, 24), seed=1, device="cuda")


@torch.no_grad()
def test_bfloat16_at_the_published_size(stage_c: StableCascadeUNet) -> None:
    """By the kernels, a prediction with an adapter is as near to float32 as one without."""
    torch.manual_seed(2)
    adapter = IPAdapter().cuda()
    adapter.copy_keys(stage_c)
    for pair in adapter.ip_adapter.values():
        torch.nn.init.normal_(pair.to_v_ip.weight, std=0.02)
    features = torch.randn(1, 257, 1024, device="cuda")
    sample, ratio = torch.randn(2, 16, 24, 24, device="cuda"), torch.tensor([0.7, 0.7], device="cuda")
    given = {name: x.cuda() for name, x in random_conditions(stage_c.config, (24, 24), 2).items()}

    def predict(network: StableCascadeUNet, adapter: IPAdapter, scale: float) -> Tensor:
        images = (AdapterImage(adapter(features), scale),) if scale else ()
        (conditions,) = images_by_step(network.condition(**given), images, 1, 2)
        return network(sample, ratio, conditions).float()

    exact = {scale: predict(stage_c, adapter, scale) for scale in (0.0, 1.0)}
    assert (exact[1.0] - exact[0.0])[0].norm() > 1e-3 * exact[0.0][0].norm()
    assert torch.equal(exact[1.0][1], exact[0.0][1])
    half, adapter = stage_c.bfloat16(), adapter.bfloat16()
    half.use_kernels("triton")
    errors = {scale: (predict(half, adapter, scale) - exact[scale]).norm() / exact[scale].norm() for scale in exact}
    print({scale: f"{error:.5f}" for scale, error in errors.items()})
    assert errors[1.0] < 1.5 * errors[0.0]


def test_graphs_serve_all_scales_and_spans(mini_with_controlnets: Path) -> None:
    """And without a reference, pictures are to the bit those of a model without an adapter."""
    cascade = Cascade.load(mini_with_controlnets, "cuda", torch.bfloat16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    plain = Request("a cat", **SMALL)
    before = cascade.generate(plain)[0].tobytes()
    pictures = {before}
    asked = {"ip_adapter_images": (image,), **SMALL}
    for more in ({}, {"ip_adapter_scales": (0.5,)}, {"ip_adapter_ends": (0.5,)}):
        pictures.add(cascade.generate(Request("a cat", **asked, **more))[0].tobytes())
        graphs = len(cascade.runner.graphs)
    assert len(pictures) == 4
    cascade.generate(Request("a cat", **asked, ip_adapter_starts=(0.5,)))
    assert len(cascade.runner.graphs) == graphs
    assert cascade.generate(plain)[0].tobytes() == before
    assert cascade.generate(Request("a cat", **asked, ip_adapter_scales=(0,)))[0].tobytes() == before


def test_the_encoder_replays_both_results(mini_with_controlnets: Path) -> None:
    cascade = Cascade.load(mini_with_controlnets, "cuda", torch.bfloat16)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    both = Request("a cat", image_prompts=(image,), ip_adapter_images=(image,), **SMALL)
    one, two = (cascade.generate(both)[0].tobytes() for _ in range(2))
    assert one == two
    encoder: ImagePromptEncoder = cascade.image_prompts
    assert encoder.features([image]).shape[1:] == (65, 128)


def test_a_training_step_in_mixed_precision(mini_with_controlnets: Path) -> None:
    cascade = Cascade.load(mini_with_controlnets, "cuda", torch.float32, memory="resident")
    prior = cascade.prior.requires_grad_(False)
    adapter = shuffle(cascade.ip_adapter, 3).train().requires_grad_(True)
    assert len(attention_blocks(prior)) == 8
    given = {name: x.cuda() for name, x in random_conditions(prior.config, (6, 6), 4).items()}
    with torch.autocast("cuda", torch.bfloat16):
        conditions = prior.condition(**given)
        pairs = adapter(torch.randn(4, 65, 128, device="cuda"))
        conditions = conditions._replace(images=image_tokens(pairs, conditions), masks=(None,))
        prior(
            torch.randn(4, 16, 6, 6, device="cuda"), torch.rand(4, device="cuda"), conditions
        ).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapter.parameters())
