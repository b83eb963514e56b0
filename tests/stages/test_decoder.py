"""Stages B and A and the semantic encoder: what they are given, and what comes back."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade import sizes
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import Noise, finish
from cascade.stages.decoder import decoder_steps
from cascade.stages.encoder import encode_pixels
from cascade.stages.pixels import decode_pixels, decoding_bytes, tile_within
from tests.tiny import count_calls

SIZE = (16, 24)
POOLED = torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def decoder(components: dict[str, Any]) -> StableCascadeUNet:
    return copy.deepcopy(components["decoder"])


def semantic(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, 2, 3, generator=torch.Generator().manual_seed(seed))


def make(decoder: StableCascadeUNet, latents: Tensor, *, seeds: tuple[int, ...] = (1,), **options: Any) -> Tensor:
    return finish(decoder_steps(decoder, latents, *POOLED, size=SIZE, noise=Noise(seeds), **{"steps": 3, **options}))


def test_shape_steps_and_dtype(decoder: StableCascadeUNet) -> None:
    steps = list(decoder_steps(decoder, semantic(2), *POOLED, size=SIZE, noise=Noise([1, 2]), steps=3))
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    for step in steps:
        assert step.x.shape == step.x0.shape == (2, 4, *SIZE)
        assert step.x.dtype == torch.float32
        assert not step.x.requires_grad


@pytest.mark.parametrize(("guidance", "batch"), [(1.1, 4), (1.0, 2), (0.0, 2)])
def test_halves_and_maps_are_computed_as_often_as_needed(
    decoder: StableCascadeUNet, monkeypatch: pytest.MonkeyPatch, guidance: float, batch: int
) -> None:
    forwards = count_calls(decoder, monkeypatch)
    maps = count_calls(decoder.effnet_mapper, monkeypatch)
    make(decoder, semantic(2), seeds=(1, 2), guidance=guidance)
    assert forwards == [batch] * 3
    assert maps == [batch]


def test_unconditional_half_has_no_semantic_latents(
    decoder: StableCascadeUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    condition = decoder.condition

    def watched(pooled: Tensor, **tensors: Any) -> Any:
        given.append((pooled, tensors["effnet"]))
        return condition(pooled, **tensors)

    monkeypatch.setattr(decoder, "condition", watched)
    make(decoder, semantic(2), seeds=(1, 2))
    ((pooled, effnet),) = given
    assert torch.equal(effnet, torch.cat([semantic(2), torch.zeros(2, 16, 2, 3)]))
    assert torch.equal(pooled, torch.cat([POOLED[0], POOLED[0], POOLED[1], POOLED[1]]))


def test_everything_given_matters(decoder: StableCascadeUNet) -> None:
    results = [
        make(decoder, semantic()),
        make(decoder, semantic(seed=1)),
        make(decoder, semantic(), guidance=3.0),
        make(decoder, semantic(), guidance=3.0, rescale=0.0),
        make(decoder, semantic(), shift=2.0),
        make(decoder, semantic(), sampler="lcm"),
        make(decoder, semantic(), seeds=(2,)),
    ]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert not torch.allclose(first, second, rtol=1e-3)


def test_an_image_does_not_depend_on_its_batch(decoder: StableCascadeUNet) -> None:
    latents = semantic(3)
    together = make(decoder, latents, seeds=(1, 2, 3))
    for i, seed in enumerate((1, 2, 3)):
        alone = make(decoder, latents[i : i + 1], seeds=(seed,))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-3)


def test_wrong_arguments_are_refused(decoder: StableCascadeUNet) -> None:
    with pytest.raises(ValueError, match="semantic latents of 2 images; noise has seeds for 1"):
        make(decoder, semantic(2))
    with pytest.raises(ValueError, match=r"guidance is 1.1; above 1 it needs a negative embedding"):
        decoder_steps(decoder, semantic(), POOLED[0], size=SIZE, noise=Noise([1]))


def test_pixels_are_decoded_one_by_one(components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan = copy.deepcopy(components["vqgan"])
    latents = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = vqgan.decode(latents, scale=0.43).clamp(0, 1)
    calls = count_calls(vqgan, monkeypatch, "decode")
    pictures = decode_pixels(vqgan, latents, 0.43)
    torch.testing.assert_close(next(pictures), expected[0])
    assert calls == [1]
    torch.testing.assert_close(torch.stack(list(pictures)), expected[1:])
    assert calls == [1, 1, 1]


def test_pixels_are_float32_whatever_stage_a_is(components: dict[str, Any]) -> None:
    vqgan = copy.deepcopy(components["vqgan"]).to(torch.bfloat16)
    (pixels,) = decode_pixels(vqgan, torch.zeros(1, 4, 6, 8))
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 24, 32)


@pytest.mark.parametrize("size", [(64, 64), (72, 200), (100, 333), (256, 256)])
def test_encoded_pictures_have_the_size_that_stage_c_makes(components: dict[str, Any], size: tuple[int, int]) -> None:
    effnet = copy.deepcopy(components["effnet"])
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    latents = encode_pixels(effnet, pixels)
    assert not latents.requires_grad
    assert latents.shape == (2, 16, *sizes.semantic_size(*sizes.native_size(*size)))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents[1:], encode_pixels(effnet, pixels[1:]), rtol=1e-4, atol=1e-4)
    assert encode_pixels(effnet.to(torch.bfloat16), pixels).dtype == torch.float32


def test_encoding_takes_three_quarters_of_the_size(components: dict[str, Any]) -> None:
    """Stripes finer than two pixels of the smaller picture must not alias: their mean is what the encoder sees."""
    effnet = copy.deepcopy(components["effnet"])
    stripes = torch.zeros(1, 3, 128, 128)
    stripes[..., ::2] = 1
    seen = []
    effnet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encode_pixels(effnet, stripes)
    (small,) = seen
    assert small.shape == (1, 3, 96, 96)
    assert (small - 0.5).abs().mean() < 0.3


def test_pictures_out_of_range_are_refused(components: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="width is 63; it must be from 64 to 4096"):
        encode_pixels(components["effnet"], torch.zeros(1, 3, 64, 63))


def make_deep_stage_a(blocks: int = 12, levels: int = 2) -> StageA:
    """As deep as the published one, and narrow; every block does something."""
    torch.manual_seed(0)
    network = StageA(bottleneck_blocks=blocks, levels=levels, embed_dim=16, num_vq_embeddings=8).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("gammas"):
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        pixels = network.decode(torch.randn(1, 4, 32, 32))
        network.out_block[0].weight.mul_(0.2 / pixels.std())
        network.out_block[0].bias.fill_(0.5)
    return network


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "levels"), [(12, 2), (3, 3), (1, 1)])
@pytest.mark.parametrize("tile", [1, 7, 24, 40, 100])
def test_tiles_have_no_seams(blocks: int, levels: int, tile: int) -> None:
    vqgan = make_deep_stage_a(blocks, levels)
    latents = torch.randn(2, 4, 66, 45, generator=torch.Generator().manual_seed(0))
    if tile == 1:
        latents = latents[..., :6, :5]
    whole = list(decode_pixels(vqgan, latents, 0.43))
    tiled = list(decode_pixels(vqgan, latents, 0.43, tile))
    assert torch.stack(whole).std() > 0.05
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_a_smaller_margin_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan = make_deep_stage_a()
    latents = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(0))
    (whole,) = decode_pixels(vqgan, latents)
    monkeypatch.setattr(vqgan, "reach", 3)
    (tiled,) = decode_pixels(vqgan, latents, tile=24)
    assert (whole - tiled).abs().max() > 1e-4


@settings(deadline=None)
@given(height=st.integers(16, 512), width=st.integers(16, 512), room=st.integers(0, 2**31))
def test_tiles_fit(deep: StageA, height: int, width: int, room: int) -> None:
    tile = tile_within(deep, height, width, room)
    needed = decoding_bytes(deep, min(height, tile + 28), min(width, tile + 28))
    assert needed <= room or tile <= 24
    if room >= decoding_bytes(deep, height, width):
        assert tile == max(height, width)


@pytest.fixture(scope="module")
def deep() -> StageA:
    return make_deep_stage_a()
