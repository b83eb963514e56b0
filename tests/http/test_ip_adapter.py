"""The IP-Adapter over HTTP, on the miniature with one that has learned nothing."""

import base64
from typing import Any

import pytest
from PIL import Image

from tests.http.serving import Server, data_url, picture
from tests.http.test_images import BLUE, QUICK, RED, halves, made, refusal
from tests.metadata import read_record

REFERENCE = data_url(halves())
LEFT = Image.new("L", (64, 64))
LEFT.paste(255, (0, 0, 32, 64))


def test_every_input_counts(controlled: Server) -> None:
    one = {"ip_adapter_images": [REFERENCE]}
    two = {"ip_adapter_images": [REFERENCE, data_url(Image.new("RGB", (64, 64), BLUE))]}
    different = [
        {},
        one,
        {**one, "ip_adapter_scales": [0.5]},
        {**one, "ip_adapter_mode": "style"},
        {**one, "ip_adapter_masks": [data_url(LEFT)]},
        two,
        {**two, "ip_adapter_scales": [1, 2]},
        {**two, "ip_adapter_masks": [data_url(LEFT), data_url(LEFT.transpose(Image.Transpose.ROTATE_180))]},
        {**one, "image_prompts": [REFERENCE], "control_images": [REFERENCE]},
    ]
    assert len({made(controlled, **inputs) for inputs in different}) == len(different)
    assert made(controlled, **one, ip_adapter_scales=[0]) == made(controlled)


def test_the_record_makes_the_picture_again(controlled: Server) -> None:
    files = {"ip_adapter_images": [REFERENCE], "ip_adapter_masks": [data_url(LEFT)]}
    (output,) = controlled.predict(**QUICK, **files, ip_adapter_scales=[0.75], ip_adapter_mode="style")["output"]
    record = read_record(base64.b64decode(output.partition(",")[2]))
    assert record["inputs"]["ip_adapter_scales"] == [0.75]
    assert record["inputs"]["ip_adapter_mode"] == "style"
    assert [(one["input"], one["index"]) for one in record["files"]] == [
        ("ip_adapter_images", 0),
        ("ip_adapter_masks", 0),
    ]
    assert made(controlled, **record["inputs"], **files) == picture(output).tobytes()


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"ip_adapter_scales": [1]}, "ip_adapter_scales needs ip_adapter_images, which is left out."),
        ({"ip_adapter_masks": [REFERENCE]}, "ip_adapter_masks needs ip_adapter_images, which is left out."),
        (
            {"ip_adapter_images": [REFERENCE], "ip_adapter_scales": [1, 1]},
            "ip_adapter_scales has 2 values; it must have 1, one for each of ip_adapter_images.",
        ),
        (
            {"ip_adapter_images": [REFERENCE], "ip_adapter_masks": [data_url(Image.new("L", (9, 9)))]},
            "ip_adapter_masks[0] is black all over, so that its image would be used nowhere.",
        ),
        (
            {"ip_adapter_images": [REFERENCE], "ip_adapter_mode": "composition"},
            "ip_adapter_mode is 'composition', but the IP-Adapter's configuration names no composition_blocks; use 'all'.",
        ),
        (
            {"ip_adapter_images": ["data:image/png;base64,AAAA"]},
            "ip_adapter_images[0] is not a picture in one of the formats",
        ),
    ],
)
def test_refused_in_one_sentence(controlled: Server, inputs: dict[str, Any], sentence: str) -> None:
    assert refusal(controlled, **inputs).startswith(sentence)
    assert made(controlled)


def test_a_model_without_one(cautious: Server) -> None:
    said = refusal(cautious, ip_adapter_images=[data_url(Image.new("RGB", (64, 64), RED))])
    assert said.startswith("This model has no IP-Adapter, which ip_adapter_images need;")
