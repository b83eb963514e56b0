"""Whatever fits the published schema works, whatever does not is refused, and nothing piles up."""

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.http.serving import ANSWER, SMALL, Server, data_url, picture

# The schema allows 4096 x 4096 in 100 steps; these keep a case under a second.
CAPS = {"width": 128, "height": 128, "num_images": 2, "steps_prior": 2, "steps_decoder": 2}
# These need one another, weights, or an image of a certain size: what fits the schema may still get a sentence.
TOGETHER = {"mask", "outpaint", "upscale", "image_prompt_strengths", "lora_weights", "lora_scales", "speed"}
TOGETHER |= {f"ip_adapter_{name}" for name in ("images", "scales", "masks", "mode")}
TOGETHER |= {f"control_{name}" for name in ("images", "types", "scales", "ranges")}
KINDS = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}
# Larger floats Cog's JSON reader may take for one beside them: 1801439850948199.0 for 1801439850948199.2, no integer.
EXACT = 2**53 // 10
COGS_FOLDER = Path("/tmp/coglet/predictions")

anything = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
anything |= st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)

# Pictures of any size and mode, as data URLs.
images = st.builds(
    lambda mode, width, height: data_url(Image.new(mode, (width, height))),
    st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "I;16"]),
    st.integers(4, 128),
    st.integers(4, 128),
)


@functools.cache
def published_inputs(server: Server) -> dict[str, dict[str, Any]]:
    """name -> schema, with the references of choices replaced by what they refer to."""
    schemas = requests.get(f"{server.url}/openapi.json", timeout=ANSWER).json()["components"]["schemas"]
    inputs = {}
    for name, field in schemas["Input"]["properties"].items():
        (reference,) = field.get("allOf", [{"$ref": "#/Input"}])
        choices = schemas[name] if reference["$ref"] == f"#/components/schemas/{name}" else {}
        inputs[name] = {**field, **choices, "maximum": CAPS.get(name, field.get("maximum"))}
    return inputs


def fits(value: Any, field: dict[str, Any]) -> bool:
    """Whether JSON Schema lets a value through: 20.0 is an integer, True is none, and a large float can be read as one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right_kind = {
        "string": isinstance(value, str),
        "array": isinstance(value, list)
        and "items" in field
        and all(fits(element, field["items"]) for element in value),
        "boolean": isinstance(value, bool),
        "number": number,
        "integer": number and (value == int(value) or abs(value) > EXACT),
    }[field["type"]]
    in_range = not number or field.get("minimum", value) <= value <= (field.get("maximum") or value)
    return right_kind and in_range and value in field.get("enum", [value])


def values(field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit."""
    if "enum" in field:
        return st.sampled_from(field["enum"])
    if field.get("format") == "uri":
        return images
    if field["type"] == "array":
        return st.lists(values(field["items"]), max_size=4)
    low, high = field.get("minimum"), field.get("maximum")
    if field["type"] == "integer":
        exact = st.integers(-EXACT if low is None else low, EXACT if high is None else high)
        return st.integers(low, high) | exact.map(float)
    if field["type"] == "number":
        return st.floats(low, high, allow_nan=False, allow_infinity=False) | st.integers(low, high)
    return {"boolean": st.booleans(), "string": st.text(st.characters(codec="utf-8"))}[field["type"]]


def misfits(name: str, field: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that do not fit, even where the caps above are ours."""
    top = {"width": 4096, "height": 4096, "num_images": 4, "steps_prior": 50, "steps_decoder": 50}
    published = {**field, "maximum": top.get(name, field["maximum"])}
    return anything.filter(lambda value: not fits(value, published))


def check_pictures(inputs: dict[str, Any], prediction: dict[str, Any]) -> None:
    """A success has as many pictures as were asked for, whole, of the format and exactly the size asked for."""
    assert prediction["status"] == "succeeded", prediction
    pictures = [picture(output) for output in prediction["output"]]
    assert len(pictures) == inputs.get("num_images", 1)
    for image in pictures:
        assert image.size == (inputs["width"], inputs["height"])
        assert image.format == KINDS[inputs.get("output_format", "webp")]
    if "seed" in inputs:
        firsts = [inputs["seed"]]
        if not -(2**63) <= inputs["seed"] < 2**64:  # there Cog's JSON reader takes it for a float, or for one beside it
            near = float(inputs["seed"])
            firsts = [math.nextafter(near, -math.inf), near, math.nextafter(near, math.inf)]
        possible = [[(int(first) + i) % 2**32 for i in range(len(pictures))] for first in firsts]
        assert prediction["metrics"]["seeds"] in possible


# Half as many examples as elsewhere: each is a prediction.
@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_request_that_fits_the_schema_makes_pictures(shared_server: Server, data: st.DataObject) -> None:
    """Or, of the inputs that need others, gets one sentence that names what is wrong."""
    fields = published_inputs(shared_server)
    always = {"width", "height", "steps_prior", "steps_decoder"}
    alone = st.sets(st.sampled_from(sorted(set(fields) - always - TOGETHER)))
    given_names = data.draw(alone | st.sets(st.sampled_from(sorted(set(fields) - always)))) | always
    inputs = {name: data.draw(values(fields[name]), label=name) for name in sorted(given_names)}
    spoilt = data.draw(st.just(set()) | st.sets(st.sampled_from(sorted(fields)), max_size=3), label="spoilt")
    inputs |= {name: data.draw(misfits(name, fields[name]), label=name) for name in sorted(spoilt)}
    shared_server.wait_until("READY")
    answer = shared_server.post(inputs)
    if spoilt:
        assert answer.status_code == 422, answer.text
        # An element of a list is named by its place: image_prompts/0.
        assert {problem["loc"][-1].split("/")[0] for problem in answer.json()["detail"]} == spoilt
        return
    assert answer.status_code == 200, answer.text
    prediction = answer.json()
    if prediction["status"] == "failed" and TOGETHER & set(inputs):
        sentence = prediction["error"].partition("Error: ")[2]
        assert any(name in sentence for name in (*fields, "controlnet"))
        assert sentence.endswith(".")
        assert len(sentence) < 250
    else:
        check_pictures(inputs, prediction)


@settings(max_examples=50)
@given(anything)
def test_no_body_crashes_the_server(shared_server: Server, body: Any) -> None:
    for whole in ([body], {"input": {"seed": "one"}, "webhook": body}, {"input": [body]}):
        assert shared_server.send(whole).status_code in (400, 422)
    assert shared_server.status() == "READY"


def test_nothing_piles_up(server: Server, pytestconfig: pytest.Config) -> None:
    """Predictions of many sizes, with bad inputs, cancels and clients that go away in between."""
    mine = f"soak-{os.getpid()}"
    memory = []
    count = 600 if pytestconfig.getoption("--long") else 100
    for i in range(count):
        inputs = {**SMALL, "width": 64 + 8 * (i % 13), "height": 64 + 8 * (i % 7), "num_images": 1 + (i % 4 == 3)}
        server.wait_until("READY")
        answer = server.put(f"{mine}-{i}", inputs)
        check_pictures(inputs, answer.json())
        if i % 10 == 2:
            assert server.post({**inputs, "width": "wide"}).status_code == 422
        if i % 20 == 4:
            with server.busy(f"{mine}-{i}-cancelled"):
                assert server.post(inputs).status_code == 409
        if i % 20 == 6:
            server.abandon()
        if i % 10 == 9:
            memory.append(server.memory())
    assert memory[-1] - memory[0] < 50 * 2**20, [f"{size / 2**20:.0f} MB" for size in memory]
    left = sorted(path.name for path in server.temporary.rglob("*") if path.is_file())
    assert left == ["out-0.webp", "out-1.webp"]
    assert [path for folder in COGS_FOLDER.glob(f"{mine}*") for path in folder.rglob("*") if path.is_file()] == []
