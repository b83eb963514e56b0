"""Pictures with a side above 2048 pixels, and compression. Most tests lower that side, because tiles take time on a CPU."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import sizes
from cascade.compat.diffusers import DiffusersCascade
from cascade.guides.controls import Control
from cascade.guides.ip_adapter import mask_of_latents
from cascade.pipeline import Cascade
from cascade.request import Request, upscaling
from cascade.stages import tiles
from tests.test_pipeline import photo, read
from tests.tiny import count_calls, make_cascade

WIDTH, HEIGHT = 203, 136
LARGE = {"width": WIDTH, "height": HEIGHT, "steps_prior": 1, "steps_decoder": 2}
UNGUIDED = {"guidance_scale_prior": 1.0, "guidance_scale_decoder": 1.0}


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of two tiles for `LARGE`: 204x136 pixels have 34x52 decoder latents, and are above this."""
    monkeypatch.setattr(sizes, "WHOLE", 128)
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(tiles, "OVERLAP", 8)
    monkeypatch.setattr(tiles, "GRID", 4)


def test_a_side_above_2048_is_made_in_tiles(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_calls(cascade.decoder, monkeypatch)
    stages = [one.stage for one in cascade.steps(Request("a cat", width=2048, height=64, steps_prior=1))]
    assert "tiles" not in stages
    assert forwards == [2, 2]
    forwards.clear()
    progress = list(cascade.steps(Request("a cat", width=2051, height=66, steps_prior=1)))
    assert [one.stage for one in progress] == ["text", "prior", "tiles", "decoder", "tiles", "decoder", "image"]
    assert forwards == [2] * 4, "both halves of a tile together"
    assert progress[-1].image.size == (2051, 66)


@pytest.mark.usefixtures("lowered")
def test_pieces_of_work_are_counted(cascade: Cascade) -> None:
    progress = list(cascade.steps(Request("a cat", num_images=2, **LARGE)))
    one = ["prior", *["tiles", "tiles", "tiles", "decoder"] * 2, "image"]
    assert [each.stage for each in progress] == ["text", *one, *one]
    assert [each.done for each in progress] == list(range(1, 22))
    assert {each.total for each in progress} == {21}
    assert [each.latents is None for each in progress if each.stage in ("tiles", "decoder")] == 4 * [
        True,
        True,
        True,
        False,
    ]
    pictures = [each.image for each in progress if each.image is not None]
    assert [picture.size for picture in pictures] == [(WIDTH, HEIGHT)] * 2
    (other,) = cascade.generate(Request("a cat", seed=1, **LARGE))
    assert np.abs(read(pictures[1]) - read(other)).max() <= 1


@pytest.mark.usefixtures("lowered")
def test_a_request_may_be_stopped_between_tiles(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_calls(cascade.decoder, monkeypatch)
    work = cascade.steps(Request("a cat", **LARGE))
    while next(work).stage != "tiles":
        pass
    work.close()
    assert forwards == [2]
    assert cascade.generate(Request("a cat", **LARGE))[0].size == (WIDTH, HEIGHT)


@pytest.mark.usefixtures("lowered")
def test_fewer_tiles_at_a_time_where_memory_does_not_suffice(
    components: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cascade = make_cascade(components)
    (expected,) = cascade.generate(Request("a cat", **LARGE, **UNGUIDED))
    batches: list[int] = []

    def forward(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        batches.append(len(inputs[0]))
        if batches[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with cascade.decoder.register_forward_pre_hook(forward):
        progress = list(cascade.steps(Request("a cat", **LARGE, **UNGUIDED)))
        assert batches == [2, *[1] * 8], "four tiles, not three and one"
        assert [record.getMessage() for record in caplog.records] == [
            "Out of memory with 3 tiles of a picture at a time of 203x136: going on with 1 at a time.",
        ]
        assert progress[-1].done == progress[-1].total == len(progress)
        assert np.abs(read(progress[-1].image) - read(expected)).max() <= 1
        batches.clear()
        cascade.generate(Request("a cat", **LARGE, **UNGUIDED))
        assert batches == [1] * 8


@pytest.mark.usefixtures("lowered")
def test_outside_of_a_mask_the_image_stays(cascade: Cascade) -> None:
    image = photo(WIDTH, HEIGHT)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[30:90, 60:150] = True
    small = {"steps_prior": 1, "steps_decoder": 1}
    (made,) = cascade.generate(Request("a cat", image=image, mask=Image.fromarray(inside), **small))
    assert np.array_equal(read(made)[~inside], read(image)[~inside])
    assert not np.array_equal(read(made)[inside], read(image)[inside])


@pytest.mark.usefixtures("lowered")
def test_images_controls_and_adapters_guide_large_pictures(cascade: Cascade) -> None:
    image = photo(120, 90)
    variants: list[dict[str, Any]] = [
        {},
        {"negative_prompt": "fog"},
        {"image": image, "prompt_strength": 0.5},
        {"controls": (Control("canny", image),)},
        {"controls": (Control("super_resolution", image),)},
        {"image_prompts": (image,)},
        {"compression": 64},
    ]
    made = [cascade.generate(Request("a cat", **LARGE, **one))[0] for one in variants]
    assert {picture.size for picture in made} == {(WIDTH, HEIGHT)}
    assert len({picture.tobytes() for picture in made}) == len(variants)


@pytest.mark.usefixtures("lowered")
def test_enlarging_and_reconstructing_in_tiles(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = count_calls(cascade.decoder, monkeypatch)
    (large,) = cascade.generate(upscaling(photo(101, 68), "a cat", steps_prior=1, steps_decoder=1))
    assert (large.size, forwards) == ((202, 136), [2] * 4)
    assert cascade.reconstruct(photo(WIDTH, HEIGHT), compression=64).size == (WIDTH, HEIGHT)


@pytest.mark.usefixtures("lowered")
def test_diffusers_numerics_go_in_tiles(components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = make_cascade(components, DiffusersCascade)
    forwards = count_calls(cascade.decoder, monkeypatch)
    (picture,) = cascade.generate(Request("a cat", width=256, height=256, steps_prior=1, steps_decoder=1))
    assert picture.size == (256, 256)
    assert forwards == [3, 3, 3]
    with pytest.raises(ValueError, match=r"^compression is 64\.0; diffusers' numerics have 42\.67 only\.$"):
        cascade.generate(Request("a cat", compression=64))


@pytest.mark.parametrize(("compression", "size"), [(32, (4, 6)), (42.67, (3, 5)), (64, (2, 3))])
def test_compression_decides_how_many_latents_stage_c_has(
    cascade: Cascade, compression: float, size: tuple[int, int]
) -> None:
    image, asked = photo(192, 128), {"width": 192, "height": 128, "steps_prior": 1, "steps_decoder": 1}
    mask = Image.new("L", (192, 128), 255)
    controls = (Control("canny", image), Control("super_resolution", image), Control("inpainting", image))
    request = Request("a cat", compression=compression, image=image, mask=mask, controls=controls, **asked)
    (latents,) = (one.latents for one in cascade.steps(request) if one.stage == "prior")
    assert latents.shape == (1, 16, *size)
    assert cascade.encode(image, compression).shape == (1, 16, *size)
    assert mask_of_latents(mask, (128, 192), compression).shape == (1, 1, *size)


def test_compression_is_kept_to_its_limits(cascade: Cascade) -> None:
    assert Request("a cat").compression == sizes.SEMANTIC_PIXELS
    for wrong in (31.9, 64.1, "64"):
        with pytest.raises(ValueError, match=r"^compression is .*; it must be a number from 32 to 64\.$"):
            Request("a cat", compression=wrong)
        with pytest.raises(ValueError, match=r"^compression is "):
            cascade.encode(photo(64, 64), wrong)
