"""Inpainting and outpainting: unmasked pixels are kept exactly, and masked ones are made anew."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.guides.controls import Control
from cascade.guides.inpainting import SEAM, extend, latents_of, read_mask, set_into
from cascade.images.colours import to_rgb
from cascade.limits import InputError
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.sizes import native_size, semantic_size
from tests.test_pipeline import photo, read
from tests.tiny import make_cascade

QUICK = {"steps_prior": 2, "steps_decoder": 1}
sides = st.integers(64, 260)


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@settings(max_examples=12, deadline=None)
@given(width=sides, height=sides, data=st.data())
def test_outside_of_the_mask_every_pixel_is_the_image_s(cascade: Cascade, width: int, height: int, data: Any) -> None:
    left, top = data.draw(st.integers(0, width - 10)), data.draw(st.integers(0, height - 10))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    image, mask = photo(width, height), box_mask((width, height), (left, top, right, bottom))
    (made,) = cascade.generate(Request("a cat", image=image, mask=mask, **QUICK))
    assert made.size == (width, height)
    difference = np.abs(read(made) - read(image)).max(2)
    outside = np.asarray(mask) == 0
    assert not difference[outside].any()
    assert difference[~outside].any()


def test_every_picture_of_several_is_inpainted(cascade: Cascade) -> None:
    image, mask = photo(128, 72), box_mask((128, 72), (30, 20, 90, 60))
    made = cascade.generate(Request("a cat", image=image, mask=mask, num_images=5, **QUICK))
    assert len({one.tobytes() for one in made}) == 5
    outside = np.asarray(mask) == 0
    assert all((read(one)[outside] == read(image)[outside]).all() for one in made)


def test_images_of_other_modes_keep_what_one_sees(cascade: Cascade) -> None:
    image = photo(80, 80).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 40, 80))
    (made,) = cascade.generate(Request("", image=image, mask=box_mask((80, 80), (60, 0, 80, 80)), **QUICK))
    assert (read(made)[:, :40] == 255).all()


def test_a_white_mask_is_image_to_image(components: dict[str, Any]) -> None:
    """Except that there is no seam, and that pictures have the image's size."""
    cascade = make_cascade(components)
    asked = {"image": photo(128, 128), "prompt_strength": 0.7, **QUICK}
    (plain,) = cascade.generate(Request("a cat", **asked))
    silent = (Control("inpainting", photo(128, 128), scale=0.0),)
    (masked,) = cascade.generate(Request("a cat", mask=Image.new("1", (128, 128), 1), controls=silent, **asked))
    assert np.abs(read(masked) - read(plain)).max() <= 1


def test_latents_of_untouched_pixels_are_held(components: dict[str, Any]) -> None:
    """Masks in the same latents give the same latents, wherever they are inside of them."""
    cascade = make_cascade({name: part for name, part in components.items() if name != "controlnet_inpainting"})
    image = photo(128, 128)
    made = {}
    for box in ((0, 0, 40, 40), (7, 9, 8, 10), (40, 0, 44, 1), (0, 0, 128, 128)):
        request = Request("a cat", image=image, mask=box_mask((128, 128), box), steps_prior=4, steps_decoder=1)
        *_, last = (progress for progress in cascade.steps(request) if progress.stage == "prior")
        made[box] = last.latents
        free = latents_of(np.asarray(request.mask) > 0, (3, 3)).expand(1, 16, 3, 3)
        assert torch.equal(last.latents[~free], cascade.encode(image)[~free])
    corner, pixel, two, everything = made.values()
    assert torch.equal(corner, pixel)
    assert not torch.equal(corner, two)
    assert not torch.equal(two, everything)


@given(width=st.integers(64, 700), height=st.integers(64, 700), data=st.data())
@settings(deadline=None)
def test_a_latent_is_made_anew_if_any_of_its_pixels_is(width: int, height: int, data: Any) -> None:
    """Latent i of n covers the pixels from i / n to (i + 1) / n of the padded picture."""
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    mask = np.zeros((height, width), bool)
    mask[y, x] = True
    native = native_size(height, width)
    size = semantic_size(*native)
    found = latents_of(mask, size)
    assert found.shape == (1, 1, *size)
    expected = []
    for place, side, padded, count in ((y, height, native[0], size[0]), (x, width, native[1], size[1])):
        before = (padded - side) // 2
        # The border's pixels are repeated in the padding.
        first = 0 if place == 0 else place + before
        last = padded if place == side - 1 else place + before + 1
        cells = [(Fraction(i * padded, count), Fraction((i + 1) * padded, count)) for i in range(count)]
        expected.append(torch.tensor([low < last and high > first for low, high in cells]))
    assert torch.equal(found[0, 0], expected[0][:, None] & expected[1][None, :])


# ---- masks ----


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P", "CMYK", "I;16"])
def test_masks_of_any_mode(mode: str) -> None:
    mask = box_mask((20, 10), (0, 0, 5, 10))
    if mode == "I;16":
        mask = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    expected = np.zeros((10, 20), bool)
    expected[:, :5] = True
    assert (read_mask(mask.convert(mode) if mode != "I;16" else mask, 20, 10) == expected).all()


def test_white_strokes_on_a_transparent_ground() -> None:
    mask = Image.new("RGBA", (20, 10), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (5, 0, 10, 10))
    found = read_mask(mask, 20, 10)
    assert found[:, 5:10].all()
    assert found.sum() == 50


@pytest.mark.parametrize(("grey", "white"), [(0, False), (127, False), (128, True), (255, True)])
def test_greys(grey: int, white: bool) -> None:
    assert (read_mask(Image.new("L", (4, 4), grey), 4, 4) == white).all()


@pytest.mark.parametrize("factor", [0.25, 0.5, 1, 2, 3])
def test_masks_of_another_size_are_resized(factor: float) -> None:
    mask = box_mask((int(80 * factor), int(40 * factor)), (0, 0, int(20 * factor), int(40 * factor)))
    found = read_mask(mask, 80, 40)
    assert found[:, :20].all()
    assert not found[:, 20:].any()
    Request("a cat", image=photo(80, 64), mask=Image.new("L", (int(80 * factor), int(64 * factor)), 255))


@given(width=sides, height=sides, factor=st.floats(0.05, 8))
def test_masks_that_were_made_by_resizing_the_image_have_its_shape(width: int, height: int, factor: float) -> None:
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    Request("", image=Image.new("L", (width, height)), mask=Image.new("L", size, 255))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"mask": Image.new("L", (80, 80), 255)}, InputError, "mask needs image, which is left out."),
        (
            {"image": photo(80, 80), "mask": "white"},
            InputError,
            "mask is 'white'; it must be an image (PIL.Image.Image) or 'alpha'.",
        ),
        ({"image": photo(80, 80), "mask": Image.new("L", (80, 80))}, ValueError, "mask has no white, so nothing"),
        (
            {"image": photo(80, 80), "mask": Image.new("L", (80, 40), 255)},
            ValueError,
            "mask has 80x40 pixels, and image 80x80; it must have the image's shape.",
        ),
        (
            {"image": photo(80, 63), "mask": Image.new("L", (80, 63), 255)},
            ValueError,
            "image with a mask has 80x63 pixels, and pictures have its size; each side must have 64 to 4096.",
        ),
        (
            {"image": Image.new("L", (4097, 80)), "mask": Image.new("L", (4097, 80), 255)},
            ValueError,
            "image with a mask has 4097x80 pixels, and",
        ),
        (
            {"image": photo(80, 72), "mask": Image.new("L", (80, 72), 255), "height": 80},
            ValueError,
            "height is 80, but image with a mask has 80x72 pixels, and pictures have its size.",
        ),
        ({"image": photo(80, 80), "mask": Image.new("F", (80, 80), 1)}, ValueError, "mask has 32 bits per channel"),
    ],
)
def test_wrong_masks_are_refused_in_one_sentence(request_: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        Request("a cat", **request_)
    assert str(caught.value).startswith(message)


# ---- the seam ----


def test_the_seam_lies_inside() -> None:
    image, made = Image.new("RGB", (100, 60), "black"), Image.new("RGB", (100, 60), "white")
    mask = np.zeros((60, 100), bool)
    mask[:, 40:] = True
    pixels = read(set_into(image, made, mask))[..., 0]
    assert (pixels[:, :40] == 0).all()
    assert (np.diff(pixels[:, 39 : 40 + SEAM]) > 0).all()
    assert (pixels[:, 39 + SEAM :] == 255).all()  # also at the picture's border, where there is no seam


def test_a_thin_stroke_shows_what_was_made() -> None:
    image, made = Image.new("RGB", (100, 60), "black"), Image.new("RGB", (100, 60), "white")
    for depth in (1, 2, 5):
        mask = np.zeros((60, 100), bool)
        mask[30 : 30 + depth] = True
        pixels = read(set_into(image, made, mask))[..., 0]
        assert (pixels[30 : 30 + depth].max(0) == 255).all()
        assert not pixels[~mask].any()


def test_a_mask_of_everything_has_no_seam() -> None:
    made = photo(30, 20)
    everything = np.ones((20, 30), bool)
    assert set_into(Image.new("RGB", (30, 20)), made, everything).tobytes() == made.tobytes()


# ---- outpainting ----


def test_a_larger_canvas(cascade: Cascade) -> None:
    image = photo(80, 70)
    canvas, mask = extend(image, None, 30, 0, 11, 20)
    assert canvas.size == mask.size == (121, 90)
    assert canvas.crop((30, 0, 110, 70)).tobytes() == image.tobytes()
    new = np.asarray(mask)
    assert not new[:70, 30:110].any()
    assert new.sum() == 121 * 90 - 80 * 70
    (made,) = cascade.generate(Request("a cat", image=canvas, mask=mask, **QUICK))
    assert made.size == (121, 90)
    assert made.crop((30, 0, 110, 70)).tobytes() == image.tobytes()
    assert (read(made) != read(canvas))[new].mean() > 0.5


def test_a_canvas_with_a_mask_besides() -> None:
    _, mask = extend(photo(80, 70), box_mask((40, 35), (0, 0, 10, 35)), 5, 5, 5, 5)
    new = np.asarray(mask)
    assert new[5:75, 5:25].all()
    assert not new[5:75, 25:85].any()


def test_a_canvas_that_is_too_large() -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, without escapes
        extend(photo(80, 70), None, 2000, 0, 2100, 0)
    assert str(caught.value) == (
        "outpaint is 2000, 0, 2100, 0, which makes 4180x70 pixels of image's 80x70; each side may have 4096."
    )


def test_a_mask_of_another_shape_is_no_mask_of_the_image() -> None:
    with pytest.raises(ValueError, match=r"^mask has 80x30 pixels, and image 80x70; it must have the image's shape\.$"):
        extend(photo(80, 70), Image.new("L", (80, 30)), 5, 5, 5, 5)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ((0, -1, 0, 0), "outpaint[1] is -1; it must be a whole number from 0 to 4096."),
        ((0, 0, 0, 1.5), "outpaint[3] is 1.5; it must be a whole number from 0 to 4096."),
        ((0, 0, 0, 0), "outpaint is 0, 0, 0, 0; one of its numbers must be above 0."),
    ],
)
def test_nothing_can_be_taken_away_and_something_must_be_added(added: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        extend(photo(80, 70), None, *added)
    assert str(caught.value) == message


# ---- the transparent part of the image as the mask ----


def with_hole(mode: str) -> Image.Image:
    """A picture that is transparent, in another colour, to the right of column 40. A palette's transparency is in `info`."""
    image = photo(80, 70).convert("RGBA")
    image.paste((10, 200, 10, 0), (40, 0, 80, 70))
    return image.quantize(64) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha(cascade: Cascade, mode: str) -> None:
    """Equals a request with the same mask and the image on white."""
    image = with_hole(mode)
    request = Request("a cat", image=image, mask="alpha", **QUICK)
    hole = np.zeros((70, 80), bool)
    hole[:, 40:] = True
    assert (np.asarray(request.mask.convert("1")) == hole).all()
    (made,) = cascade.generate(request)
    assert (read(made)[:, :40] == read(image.convert("RGBA").convert("RGB"))[:, :40]).all()
    same = Request("a cat", image=to_rgb(image), mask=Image.fromarray(hole), **QUICK)
    assert made.tobytes() == cascade.generate(same)[0].tobytes()


def test_half_of_transparent_is_transparent() -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    image.putpixel((5, 6), (0, 0, 0, 127))
    assert np.argwhere(np.asarray(Request("", image=image, mask="alpha").mask)).tolist() == [[6, 5]]


def test_alpha_on_a_larger_canvas() -> None:
    _, mask = extend(with_hole("RGBA"), "alpha", 5, 0, 0, 0)
    new = np.asarray(mask)
    assert new[:, :5].all()
    assert not new[:, 5:45].any()
    assert new[:, 45:].all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_an_image_without_a_transparent_region(mode: str) -> None:
    image = photo(80, 70).convert(mode)
    for ask in (lambda: Request("", image=image, mask="alpha"), lambda: extend(image, "alpha", 5, 0, 0, 0)):
        with pytest.raises(
            InputError, match=r"^mask is 'alpha', which needs a transparent region in image; there is none\.$"
        ):
            ask()
