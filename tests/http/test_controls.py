"""ControlNets, enlarging and previews over HTTP, on the miniature with ControlNets that have learned nothing."""

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.http.serving import Receiver, Server, data_url, picture, wait_for
from tests.http.test_images import BLUE, QUICK, RED, halves, made, refusal

CONTROL = data_url(halves())
ENLARGED = {"prompt": "", "steps_prior": 2, "steps_decoder": 1, "output_format": "png"}


def test_controls(controlled: Server) -> None:
    """Each input counts; several at once; lists of whole numbers will do."""
    two = [CONTROL, data_url(Image.new("RGB", (64, 64), RED))]
    different = [
        {},
        {"control_images": [CONTROL]},
        {"control_images": [CONTROL], "control_scales": [0.5]},
        {"control_images": [CONTROL], "control_ranges": [0.5, 1]},
        {"control_images": [CONTROL], "control_ranges": [0, 0.5]},
        {"control_images": [CONTROL], "control_types": ["super_resolution"]},
        {"control_images": two, "control_types": ["canny", "super_resolution"]},
        {"control_images": two, "control_types": ["canny", "super_resolution"], "control_scales": [2, 1]},
        {"image": CONTROL, "mask": data_url(Image.new("L", (128, 128), 255))},
    ]
    inpainting = {**different[-1], "control_images": [CONTROL], "control_types": ["inpainting"]}
    inpainting["image"] = data_url(halves().resize((128, 128)))
    different[-1]["image"] = inpainting["image"]
    different.append({**inpainting, "control_scales": [0.25]})
    assert len({made(controlled, **inputs) for inputs in different}) == len(different)
    assert made(controlled, control_images=[CONTROL], control_scales=[0]) == made(controlled)
    assert made(controlled, control_images=[CONTROL], control_types=[]) == made(controlled, **different[1])


def test_enlarging(controlled: Server) -> None:
    image = halves().resize((75, 101))
    prediction = controlled.predict(**ENLARGED, image=data_url(image), upscale=True)
    assert picture(prediction["output"][0]).size == (150, 202)
    assert prediction["metrics"]["pixels"] == 150 * 202


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"control_scales": [1]}, "control_scales needs control_images, which is left out."),
        (
            {"control_images": [CONTROL], "control_types": ["depth"]},
            "control_types[0] is 'depth'; it must be one of canny, inpainting, super_resolution.",
        ),
        (
            {"control_images": [CONTROL], "control_types": ["inpainting"]},
            "control_types[0] is 'inpainting', which needs mask or outpaint.",
        ),
        (
            {"control_images": [CONTROL] * 3, "control_scales": [1, 1]},
            "control_scales has 2 values; it must have 1, or 3, one for each of control_images.",
        ),
        (
            {"control_images": [CONTROL], "control_scales": [2.5]},
            "control_scales[0] is 2.5; it must be a number from 0 to 2.",
        ),
        (
            {"control_images": [CONTROL], "control_ranges": [0, -1]},
            "control_ranges[1] is -1; it must be a number from 0 to 1.",
        ),
        (
            {"control_images": [CONTROL], "control_ranges": [0.5, 0.2]},
            "control_ranges[0] is 0.5; it must be less than control_ranges[1], which is 0.2.",
        ),
        (
            {"control_images": [CONTROL], "control_types": ["super_resolution"]},
            "width of the picture is 64; with super_resolution it must be at least 127.",
        ),
        ({"upscale": True}, "upscale needs image, which is left out."),
        (
            {"upscale": True, "image": CONTROL},
            "upscale redraws all of image at twice its size; leave out width, height.",
        ),
        ({"image_prompt_strengths": [1, 1, 1]}, "image_prompt_strengths needs image_prompts, which is left out."),
        (
            {"image_prompts": [CONTROL], "image_prompt_strengths": [1, 1]},
            "image_prompt_strengths has 2 values; it must have 1, one for each of image_prompts.",
        ),
        (
            {"image_prompts": [CONTROL], "image_prompt_strengths": [3]},
            "image_prompt_strengths[0] is 3; it must be a number from 0 to 2.",
        ),
    ],
)
def test_bad_controls_get_one_sentence(controlled: Server, inputs: dict[str, Any], sentence: str) -> None:
    assert refusal(controlled, **inputs).startswith(sentence)


@pytest.mark.parametrize("size", [(63, 80), (80, 2049)])
def test_what_cannot_be_enlarged_gets_one_sentence(controlled: Server, size: tuple[int, int]) -> None:
    said = refusal(controlled, image=data_url(Image.new("RGB", size, BLUE)), upscale=True, width=None, height=None)
    assert (
        said
        == f"image has {size[0]}x{size[1]} pixels; to be enlarged to twice its size, each side must have 64 to 2048."
    )


@pytest.mark.parametrize(
    "wrong", [{"control_scales": 1}, {"control_types": "canny"}, {"control_ranges": ["1", 1]}, {"upscale": 1}]
)
def test_values_of_the_wrong_kind_are_422(controlled: Server, wrong: dict[str, Any]) -> None:
    controlled.wait_until("READY")
    answer = controlled.post({"control_images": [CONTROL], **wrong})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"][2].startswith(next(iter(wrong)))


def test_a_model_without_controlnets_says_where_they_come_from(cautious: Server) -> None:
    # Those that were published are for another Stage C than the miniature's.
    advice = "; none was published for a Stage C of width 240, but docs/training.md says how to train one."
    neither = advice.replace("but docs/training.md says how to train one", "and none can be trained here")
    assert refusal(cautious, control_images=[CONTROL]) == (
        f"This model has no controlnet_canny, which controls of the kind 'canny' need{advice}"
    )
    assert refusal(cautious, image=CONTROL, upscale=True, width=None, height=None) == (
        "This model has no controlnet_super_resolution, which upscale and controls of the kind 'super_resolution' "
        f"need{neither}"
    )


def preview_of(metrics: dict[str, Any]) -> Image.Image:
    (url,) = metrics["previews"]
    header, data = url.split(",")
    assert header == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    return image


def test_previews_while_it_runs(controlled: Server, receiver: Receiver) -> None:
    """For whoever asks again, and in webhooks; the list of pictures is what it always is."""
    inputs = {"prompt": "a red apple", "steps_prior": 50, "steps_decoder": 1, "previews": True, "width": 512}
    controlled.wait_until("READY")
    hook = {"webhook": f"{receiver.url}/done"}
    controlled.put("shown", {**inputs, "height": 512}, {"Prefer": "respond-async"}, **hook)
    # Asked again under its name, it is not run again: the answer is how far it is.
    state = wait_for(
        lambda: state if (state := controlled.put("shown", inputs).json()).get("metrics", {}).get("previews") else None,
        30,
        "a preview",
    )
    assert state["status"] == "processing"
    assert preview_of(state["metrics"]).size == (96, 96)
    updates = receiver.webhooks("/done")
    shown = [update["metrics"] for update in updates if update["metrics"].get("previews")]
    assert shown
    assert preview_of(shown[-1]).size == (96, 96)
    last = updates[-1]
    assert (last["status"], last["metrics"]["previews"]) == ("succeeded", [])
    assert len(last["output"]) == 1
    assert "data:image/jpeg" not in last["logs"]


def test_there_are_no_previews_unless_asked_for(controlled: Server) -> None:
    assert "previews" not in controlled.predict(**QUICK)["metrics"]
