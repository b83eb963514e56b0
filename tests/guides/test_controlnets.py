"""Controls in the chain: what ControlNets are shown, in which size, how often; what they do to pictures; upscaling."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade import sizes
from cascade.compat.diffusers import DiffusersCascade
from cascade.guides import controls
from cascade.guides.controls import Control
from cascade.images.tensors import to_pixels
from cascade.limits import InputError
from cascade.networks.controlnet import KINDS
from cascade.pipeline import Cascade
from cascade.request import Request, upscaling
from cascade.stages.encoder import for_encoder
from tests.test_pipeline import SMALL, photo, read
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
        "text",
        "image_prompts",
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
    cascade.planner = replace(cascade.planner, controlnets={"inpainting": 24})
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


@pytest.mark.parametrize(("size", "limits"), [((63, 64), "64 to 2048"), ((64, 2049), "64 to 2048")])
def test_what_cannot_be_enlarged(size: tuple[int, int], limits: str) -> None:
    with pytest.raises(ValueError, match=rf"^image has {size[0]}x{size[1]} pixels; .* must have {limits}\.$"):
        upscaling(Image.new("RGB", size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": Image.new("L", (80, 80))}, "mask does not go with upscaling, which makes all of the image in twice"),
        ({"width": 64}, "width does not go with upscaling, which"),
        ({"controls": [Control("canny", photo(8, 8))] * 4}, "controls has 4 values; it may have at most 3."),
        ({"prompt_strength": 2}, "prompt_strength is 2; it must be a number from 0 to 1."),
    ],
)
def test_what_does_not_go_with_upscaling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        upscaling(photo(80, 80), **options)
    assert str(caught.value).startswith(message)


def test_only_an_image_is_enlarged() -> None:
    with pytest.raises(InputError, match=r"^image is 'a\.png'; it must be an image \(PIL\.Image\.Image\)\.$"):
        upscaling("a.png")


def test_pictures_too_small_for_super_resolution(cascade: Cascade) -> None:
    asked = replace(request("super_resolution"), height=127, steps_prior=1)
    assert len(cascade.generate(asked)) == 1
    with pytest.raises(
        InputError, match=r"^height of the picture is 126; with super_resolution it must be at least 127\.$"
    ):
        replace(asked, height=126)


def test_controlnets_of_another_stage_c(components: dict[str, Any]) -> None:
    """The published ones are those of the full Stage C, 2048 wide; its lite one has 1536."""
    cascade = make_cascade(components)
    cascade.planner = replace(cascade.planner, controlnets={"canny": 2048})
    with pytest.raises(ValueError, match=r"^controlnet_canny was trained with a Stage C of width 2048; .* has 16\.$"):
        cascade.generate(request("canny"))


def test_diffusers_numerics_have_none(components: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="diffusers' numerics have no ControlNet"):
        make_cascade(components, DiffusersCascade).generate(request("canny"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "depth"}, "Control.kind is 'depth'; it must be one of canny, inpainting, super_resolution."),
        ({"image": "a.png"}, "Control.image is 'a.png'; it must be an image (PIL.Image.Image)."),
        ({"scale": -1.0}, "Control.scale is -1.0; it must be a number from 0 to 2."),
        ({"scale": math.nan}, "Control.scale is nan; it must be"),
        ({"scale": "1"}, "Control.scale is '1'; it must be"),
        ({"scale": True}, "Control.scale is True; it must be"),
        ({"start": 0.5, "end": 0.5}, "Control.start is 0.5; it must be less than Control.end, which is 0.5."),
        ({"start": -0.1}, "Control.start is -0.1; it must be a number from 0 to 1."),
        ({"end": 1.1}, "Control.end is 1.1; it must be a number from 0 to 1."),
        ({"end": None}, "Control.end is None; it must be a number from 0 to 1."),
        ({"canny_side": 0}, "Control.canny_side is 0; it must be a whole number from 1 to 4096."),
    ],
)
def test_wrong_controls_are_refused_in_one_sentence(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Control(**{"kind": "canny", "image": photo(8, 8), **wrong})
    assert str(caught.value).startswith(message)


def test_wrong_lists_of_controls() -> None:
    edges = Control("canny", photo(8, 8))
    for wrong, message in (
        ({"controls": ("canny",)}, "controls[0] is 'canny'; it must be a Control."),
        ({"controls": edges}, "controls is Control(kind='canny'"),
        ({"controls": [edges] * 5}, "controls has 5 values; it may have at most 4."),
        (
            {"controls": (edges, replace(edges, kind="inpainting"))},
            "controls[1].kind is 'inpainting', which needs mask.",
        ),
    ):
        with pytest.raises(InputError) as caught:
            Request("a cat", **wrong)
        assert str(caught.value).startswith(message)
        assert len(str(caught.value)) < 200
