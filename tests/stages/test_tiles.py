"""Stage B in tiles: how latents are divided and blended, and how near that is to Stage B as a whole."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cascade import Cascade, Request, sizes
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import Noise, Step, finish
from cascade.stages import tiles
from cascade.stages.decoder import decoder_steps, tiles_together
from cascade.stages.pixels import decode_pixels
from cascade.stages.tiles import GRID, OVERLAP, TILE, Part, Tiles, condition_in_bands, edge, ramps, starts
from miniature.evaluate_large import seam
from tests.conftest import MINI
from tests.tiny import count_calls

POOLED = torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(0))
SIZE = (56, 72)
sides = st.integers(8, sizes.LARGEST // 8).map(lambda side: 2 * side)


@pytest.fixture
def decoder(components: dict[str, Any]) -> StableCascadeUNet:
    return copy.deepcopy(components["decoder"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six tiles of 32 x 32 for `SIZE`."""
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 8)
    monkeypatch.setattr(tiles, "GRID", 4)


def semantic(batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, 5, 6, generator=torch.Generator().manual_seed(3))


def steps(decoder: StableCascadeUNet, at_once: int | None, **options: Any) -> list[Step | Part]:
    batch = options.pop("batch", 1)
    noise = Noise(range(batch))
    options = {"size": SIZE, "noise": noise, "steps": 3, "at_once": at_once, **options}
    return list(decoder_steps(decoder, semantic(batch), *POOLED, **options))


@given(side=sides)
def test_tiles_of_one_size_cover_a_side_and_overlap(side: int) -> None:
    begins, length = starts(side), edge(side)
    assert length <= TILE
    assert length == side or length % GRID == 0
    assert (begins[0], begins[-1] + length) == (0, side)
    for one, other in pairwise(begins):
        assert OVERLAP <= one + length - other < length
    assert all(begin % GRID == 0 for begin in begins[:-1])
    assert begins[-1] % 2 == 0


@given(side=sides)
def test_weights_add_up_to_one_and_vanish_towards_neighbours(side: int) -> None:
    total, weights = torch.zeros(side), ramps(side)
    for begin, weight in zip(starts(side), weights, strict=True):
        assert weight.min() >= 0
        total[begin : begin + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones(side))
    assert all(weight[0] < 0.01 for weight in weights[1:])
    assert all(weight[-1] < 0.01 for weight in weights[:-1])
    assert weights[0][0] == weights[-1][-1] == 1


@given(height=sides, width=sides, at_once=st.integers(1, 5))
def test_every_tile_is_in_one_group(height: int, width: int, at_once: int) -> None:
    divided = Tiles(height, width)
    groups = divided.groups(at_once)
    assert [number for group in groups for number in group] == list(range(len(divided)))
    lengths = {len(group) for group in groups}
    assert max(lengths) <= at_once
    assert max(lengths) - min(lengths) <= 1
    window = sum(one.mean() * one.numel() for one in divided.windows())
    assert window.item() == pytest.approx(height * width, rel=1e-4)


def test_the_largest_picture_has_nine_tiles_and_one_just_too_large_has_small_ones() -> None:
    largest = sizes.decoder_size(sizes.LARGEST, sizes.LARGEST)
    assert (len(Tiles(*largest)), Tiles(*largest).edges) == (9, (TILE, TILE))
    assert Tiles(*sizes.decoder_size(512, 4096)).edges == (128, TILE)
    assert Tiles(512, 520).edges == (288, 304)


@pytest.mark.usefixtures("small")
def test_the_map_of_bands_is_that_of_the_whole(decoder: StableCascadeUNet) -> None:
    whole = decoder.condition(POOLED[0], effnet=semantic(), latent_size=SIZE)
    bands = condition_in_bands(decoder, POOLED[0], semantic(), Tiles(*SIZE))
    torch.testing.assert_close(bands.feature_map, whole.feature_map)
    torch.testing.assert_close(bands.keys, whole.keys)
    torch.testing.assert_close(bands.values, whole.values)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_single_tile_is_the_whole(decoder: StableCascadeUNet, guidance: float) -> None:
    whole, tiled = (finish(iter(steps(decoder, at_once, guidance=guidance))) for at_once in (None, 4))
    torch.testing.assert_close(tiled, whole)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("guidance", "halves"), [(1.0, 1), (1.5, 2)])
def test_tiles_are_predicted_in_groups_with_pauses_between_them(
    decoder: StableCascadeUNet, monkeypatch: pytest.MonkeyPatch, guidance: float, halves: int
) -> None:
    shapes: list[tuple[int, ...]] = []
    decoder.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    mapped = count_calls(decoder.effnet_mapper, monkeypatch)
    taken = steps(decoder, 4, guidance=guidance)
    groups = Tiles(*SIZE).groups(tiles_together(4, halves))
    assert len(Tiles(*SIZE)) == 6
    assert shapes == 3 * [(halves * len(group), 4, 32, 32) for group in groups]
    parts = [Part(group[0], 6) for group in groups[1:]]
    assert [step if isinstance(step, Part) else step.index for step in taken] == [*parts, 0, *parts, 1, *parts, 2]
    assert mapped == [halves] * 2, "once for the picture, in bands of 16 rows"
    assert taken[-1].x.shape == (1, 4, *SIZE)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_how_many_go_together_changes_nothing(decoder: StableCascadeUNet, guidance: float) -> None:
    alone = finish(iter(steps(decoder, 1, guidance=guidance)))
    for at_once in (2, 3, 12):
        together = finish(iter(steps(decoder, at_once, guidance=guidance)))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    both = finish(iter(steps(decoder, 8, guidance=guidance, batch=2)))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_a_network_that_sees_one_place_alone_makes_the_same_in_tiles(decoder: StableCascadeUNet) -> None:
    """Without what reaches beyond a tile, tiles and whole must agree: cuts, windows, noise and condition map are right."""
    for block in decoder.blocks():
        if hasattr(block, "channelwise"):
            kernel = block.depthwise.weight
            middle = kernel.detach()[..., 1:2, 1:2].clone()
            kernel.data.zero_()[..., 1:2, 1:2] = middle
            block.channelwise[2].gamma.data.zero_()
        if hasattr(block, "self_attn"):
            block.self_attn = False
    whole, tiled = (finish(iter(steps(decoder, at_once, guidance=1.5))) for at_once in (None, 2))
    torch.testing.assert_close(tiled, whole, rtol=1e-4, atol=1e-4)
    wrong = finish(iter(steps(decoder, 2, guidance=1.5, noise=Noise([1]))))
    assert not torch.allclose(wrong, whole, rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_the_miniature_s_tiles_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 320 pixels; larger ones are tested on a GPU. Predictions side by side, without a blend, have seams."""
    monkeypatch.setattr(tiles, "TILE", 80)
    monkeypatch.setattr(tiles, "OVERLAP", 24)
    cascade = Cascade.load(MINI, "cpu", torch.float32)
    (picture,) = cascade.generate(Request("a red apple on a green background", seed=3))
    semantic, pooled = cascade.encode(picture.resize((512, 512))), cascade.text.encode(["a red apple"]).pooled

    def found() -> float:
        options = {"size": (128, 128), "noise": Noise([3]), "guidance": 1.0, "at_once": 4}
        (pixels,) = decode_pixels(cascade.vqgan, finish(decoder_steps(cascade.decoder, semantic, pooled, **options)))
        return seam([pixels], Tiles(128, 128))

    assert found() <= 1.05

    def cut(side: int) -> list[Tensor]:
        begins = starts(side)
        bounds = [*begins[1:], side]
        return [(torch.arange(begin, begin + 80) < end).float() for begin, end in zip(begins, bounds, strict=True)]

    monkeypatch.setattr(tiles, "ramps", cut)
    assert found() > 1.2
