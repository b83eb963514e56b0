"""Controls in the chain: what ControlNets are shown, in which size, how often; what they do to pictures; upscaling."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade import controls, sizes
from cascade.cascade import Cascade, Request, to_pixels
from cascade.controls import Control
from cascade.decoder import for_encoder
from cascade.networks.controlnet import KINDS
from cascade.request import upscaling
from tests.test_cascade import SMALL, photo, read
from tests.tiny import count_calls, make_cascade

LARGER = {"width": 128, "height": 128, "steps_prior": 4, "steps_decoder": 1}


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def watch(network: nn.Module) -> list[Tensor]:
    """What a network is given from now on."""
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return seen


def request(kind: str, **options: Any) -> Request:
    """One control, of a photo; a mask where the kind needs one."""
    masked = {"image": photo(128, 128), "mask": Image.new("L", (128, 128), 255)} if kind == "inpainting" else {}
    return Request("a cat", controls=(Control(kind, photo(90, 70), **options),), **{**LARGER, **masked})


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_control_changes_the_picture(cascade: Cascade, kind: str) -> None:
    settings = [{"scale": 0.0}, {}, {"scale": 0.5}, {"end": 0.5}, {"start": 0.5}]
    pictures = [cascade.generate(request(kind, **options))[0].tobytes() for options in settings]
    assert len(set(pictures)) == len(settings)
    without = replace(request(kind), controls=())
    cascade = Cascade(**{**vars_of(cascade), "controlnets": {}})
    assert cascade.generate(without)[0].tobytes() == pictures[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_that_is_not_there(cascade: Cascade, kind: str) -> None:
    others = {name: network for name, network in cascade.controlnets.items() if name != kind}
    needed_by = "upscale and controls" if kind == "super_resolution" else "controls"
    with pytest.raises(
        ValueError, match=rf"^This model has no controlnet_{kind}, which {needed_by} of the kind '{kind}' need; "
    ):
        Cascade(**{**vars_of(cascade), "controlnets": others}).generate(request(kind))


def vars_of(cascade: Cascade) -> dict[str, Any]:
    """The arguments that make the same Cascade again."""
    names = (
        "conditioner",
        "prior",
        "decoder",
        "vqgan",
        "effnet",
        "previewer",
        "controlnets",
        "defaults",
        "native_size",
    )
    return {name: getattr(cascade, name) for name in names}


def test_several_controls(cascade: Cascade) -> None:
    one, other = Control("canny", photo(128, 128)), Control("super_resolution", photo(64, 64))
    combinations = [(one,), (other,), (one, other), (one, one), (one, replace(other, scale=0.3))]
    made = [cascade.generate(Request("a cat", controls=several, **LARGER))[0] for several in combinations]
    assert len({image.tobytes() for image in made}) == len(made)
    (swapped,) = cascade.generate(Request("a cat", controls=(other, one), **LARGER))
    assert np.abs(read(swapped) - read(made[2])).max() <= 1


def test_a_control_is_read_once_a_request(components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = make_cascade(components)
    forwards = {kind: count_calls(network, monkeypatch) for kind, network in cascade.controlnets.items()}
    several = (
        Control("canny", photo(64, 64)),
        Control("canny", photo(90, 90)),
        Control("super_resolution", photo(9, 9)),
    )
    cascade.generate(Request("a cat", num_images=6, controls=several, **LARGER))
    assert forwards == {"canny": [1, 1], "inpainting": [], "super_resolution": [1]}


def test_controls_do_not_break_the_seeds(components: dict[str, Any]) -> None:
    asked = replace(request("canny"), num_images=3, seed=3)
    first, second = (make_cascade(components, max_batch=batch).generate(asked) for batch in (1, 3))
    assert len({image.tobytes() for image in second}) == 3
    for one, other in zip(first, second, strict=True):
        assert np.abs(read(one) - read(other)).max() <= 1


@pytest.mark.parametrize("side", [224, None])
def test_edges_are_shown_in_the_size_of_the_encoder(components: dict[str, Any], side: int | None) -> None:
    """As the authors have it: three quarters of the picture's size. Of another shape the middle is used."""
    cascade = make_cascade(components)
    seen = watch(cascade.controlnets["canny"])
    boxes = photo(100, 75)
    boxes.paste("white", (20, 30, 70, 60))
    wide = Image.new("RGB", (300, 75), "black")
    wide.paste(boxes, (100, 0))
    size = {"width": 100, "height": 75}
    cascade.generate(Request("a cat", controls=(Control("canny", wide, canny_side=side),), **{**SMALL, **size}))
    pixels = for_encoder(sizes.pad(to_pixels(boxes), 80, 104))
    assert seen[0].shape == (1, 1, *sizes.encoder_size(80, 104)) == (1, 1, 64, 96)
    torch.testing.assert_close(seen[0], controls.canny(pixels, side))
    assert seen[0].mean() > 0.001


def test_what_is_inpainted_is_hidden(components: dict[str, Any]) -> None:
    """Without a control that says so, too; in the encoder's size, and wherever any pixel is in the mask."""
    cascade = make_cascade(components)
    seen = watch(cascade.controlnets["inpainting"])
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 0, 128, 128))
    cascade.generate(Request("a cat", image=photo(128, 128), mask=mask, steps_prior=1, steps_decoder=1))
    (control,) = seen
    assert control.shape == (1, 4, 96, 96)
    hidden = control[0, 3].bool()
    assert hidden[:, 31:].all()  # 40 of 128 pixels are 30 of 96, and the resizing looks one further
    assert not hidden[:, :29].any()
    assert (control[0, :3, hidden] == 1).all()
    pixels = for_encoder(to_pixels(photo(128, 128)))
    torch.testing.assert_close(control[0, :3, :, :29], pixels[0, :, :, :29])


def test_the_inpainting_controlnet_is_used_where_it_is_there_and_fits(components: dict[str, Any]) -> None:
    cascade = make_cascade(components)
    seen = watch(cascade.controlnets["inpainting"])
    asked = {"image": photo(128, 128), "mask": Image.new("L", (128, 128), 255), "steps_prior": 1, "steps_decoder": 1}
    (automatic,) = cascade.generate(Request("a cat", **asked))
    (explicit,) = cascade.generate(Request("a cat", controls=(Control("inpainting", photo(128, 128)),), **asked))
    assert len(seen) == 2
    assert automatic.tobytes() == explicit.tobytes()
    cascade.controlnets["inpainting"].register_to_config(out_channels=24)
    assert cascade.generate(Request("a cat", **asked))[0].tobytes() != automatic.tobytes()
    assert len(seen) == 2


def test_upscaling(components: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the image's size, without guidance; the ControlNet sees the image's latents, each in four places."""
    cascade = make_cascade(components)
    forwards = count_calls(cascade.prior, monkeypatch)
    seen = watch(cascade.controlnets["super_resolution"])
    image = photo(101, 75)
    (made,) = cascade.generate(upscaling(image, "a cat", steps_prior=2, steps_decoder=1))
    assert made.size == (202, 150)
    assert forwards == [1, 1]
    latents = cascade.encode(image)
    assert torch.equal(seen[0], latents.repeat_interleave(2, 2).repeat_interleave(2, 3))
    other = cascade.generate(upscaling(photo(101, 75).rotate(180), "a cat", steps_prior=2, steps_decoder=1))[0]
    assert other.tobytes() != made.tobytes()
    assert upscaling(image, guidance_scale_prior=3.0).guidance_scale_prior == 3.0


@pytest.mark.parametrize(("size", "limits"), [((63, 64), "64 to 1024"), ((64, 1025), "64 to 1024")])
def test_what_cannot_be_enlarged(size: tuple[int, int], limits: str) -> None:
    with pytest.raises(ValueError, match=rf"^image has {size[0]}x{size[1]} pixels; .* must have {limits}\.$"):
        upscaling(Image.new("RGB", size))


def test_pictures_too_small_for_super_resolution(cascade: Cascade) -> None:
    asked = replace(request("super_resolution"), height=126)
    with pytest.raises(ValueError, match=r"has 128x126 pixels; .*'super_resolution', it must have at least 128x128\."):
        cascade.generate(asked)


def test_controlnets_of_another_stage_c(components: dict[str, Any]) -> None:
    """The published ones are those of the full Stage C, 2048 wide; its lite one has 1536."""
    cascade = make_cascade(components)
    cascade.controlnets["canny"].register_to_config(out_channels=2048)
    with pytest.raises(ValueError, match=r"^controlnet_canny was trained with a Stage C of width 2048; .* has 16\.$"):
        cascade.generate(request("canny"))


def test_diffusers_numerics_have_none(components: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="diffusers' numerics have no ControlNet"):
        make_cascade(components, numerics="diffusers").generate(request("canny"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "depth"}, "The kind of a control is 'depth'; it must be one of canny, inpainting, super_resolution."),
        ({"scale": -1.0}, "The scale of a control is -1.0; it must be a number of at least 0."),
        ({"scale": math.nan}, "The scale of a control is nan; it must be"),
        ({"scale": "1"}, "The scale of a control is '1'; it must be"),
        ({"start": 0.5, "end": 0.5}, "A control starts at 0.5 and ends at 0.5; these must be numbers from 0 to 1, the"),
        ({"start": -0.1}, "A control starts at -0.1 and ends at 1.0; these must be"),
        ({"end": 1.1}, "A control starts at 0.0 and ends at 1.1; these must be"),
        ({"end": None}, "A control starts at 0.0 and ends at None; these must be"),
    ],
)
def test_wrong_controls_are_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, without escapes
        Control(**{"kind": "canny", "image": photo(8, 8), **wrong})
    assert str(caught.value).startswith(message)


def test_wrong_lists_of_controls() -> None:
    edges = Control("canny", photo(8, 8))
    with pytest.raises(TypeError, match=r"^The image of a control is 'a\.png'; it must be an image\.$"):
        Control("canny", "a.png")
    with pytest.raises(TypeError, match=r"^controls has 'canny' in it; it must have controls only\.$"):
        Request("a cat", controls=("canny",))
    with pytest.raises(ValueError, match=r"^controls has 5 controls; 4 are the limit\.$"):
        Request("a cat", controls=(edges,) * 5)
    with pytest.raises(ValueError, match=r"^controls has one of the kind 'inpainting', which needs a mask"):
        Request("a cat", controls=(replace(edges, kind="inpainting"),))
