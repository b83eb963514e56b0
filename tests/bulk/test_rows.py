"""Rows become jobs and batches, by the rules of every other request."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bulk.rows import Job, batches, job_of
from bulk.run import Run
from bulk.table import Row
from cascade.limits import LIMITS, InputError, shown
from serving.inputs import check_inputs


def job(number: int = 0, folder: Path = Path("/"), error: str = "", **values: Any) -> Job:
    run = Run(table="0", rows=100, shard=10, batch=4, seed=0, keep={}, folder=str(folder), model={})
    return job_of(run, number, Row(values, error))


def test_what_is_left_out_has_its_default() -> None:
    made = job(7, width=None, output_format=None, loud=3)
    assert made.inputs == check_inputs({"seed": made.given["seed"]})
    assert made.inputs["prompt"] == LIMITS["prompt"].default
    assert job(7).inputs == made.inputs
    assert job(8).inputs["seed"] != made.inputs["seed"]
    assert job(7, seed=3).inputs["seed"] == 3


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": None},
        {"prompt": 3},
        {"width": 63},
        {"width": "64"},
        {"mask": "alpha"},
        {"control_scales": [1.0]},
        {"image_prompts": "a.png"},
        {"image": 3},
        {"lora_scales": [1.0]},
    ],
)
def test_sentences_are_those_of_a_request(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError) as caught:
        check_inputs({name: tmp_path / value if value == "a.png" else value for name, value in values.items()})
    made = job(folder=tmp_path, **values)
    assert made.error == str(caught.value)
    assert made.inputs == {}


def test_a_line_that_cannot_be_read() -> None:
    assert job(error="Line 3 is no JSON.").error == "Line 3 is no JSON."


def test_pictures_are_paths_or_urls(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(file)
    made = job(folder=tmp_path, image="a.png", mask="alpha", image_prompts=[f"@{file}", "http://host/b.png", "data:,x"])
    assert made.error == ""
    assert (made.inputs["image"], made.inputs["mask"]) == (file, "alpha")
    assert made.inputs["image_prompts"] == (file, "http://host/b.png", "data:,x")
    for value, sentence in {
        "b.png": f"image_prompts[0] is 'b.png'; there is no file {shown(str(tmp_path / 'b.png'))}.",
        "x" * 300: f"image_prompts[0] is {shown('x' * 300)}; there is no file {shown(str(tmp_path / ('x' * 300)))}.",
        "~nobody-of-this-name/a": "image_prompts[0] is '~nobody-of-this-name/a'; there is no file "
        f"{shown(str(tmp_path / '~nobody-of-this-name' / 'a'))}.",
        "@http://host/b.png": "image_prompts[0] is '@http://host/b.png'; a URL has no @ before it.",
    }.items():
        assert job(folder=tmp_path, image_prompts=[value]).error == sentence


def test_batches_are_of_one_size_and_in_order() -> None:
    sizes = [64, 128, 64, 64, 128, 64, 64, 64]
    jobs = [
        job(number, width=width, output_format="png" if number == 3 else "webp") for number, width in enumerate(sizes)
    ]
    assert [[one.number for one in batch] for batch in batches(jobs, 4)] == [[0, 2, 3, 5], [6, 7], [1, 4]]
    assert [[one.number for one in batch] for batch in batches(jobs, 1)] == [[0], [2], [3], [5], [6], [7], [1], [4]]


def test_a_row_of_several_pictures_stays_together() -> None:
    jobs = [job(number, num_images=count) for number, count in enumerate([1, 3, 4, 2, 2, 1])]
    assert [[one.number for one in batch] for batch in batches(jobs, 4)] == [[0, 1], [2], [3, 4], [5]]
    assert [[one.number for one in batch] for batch in batches(jobs, 2)] == [[0], [1], [2], [3], [4], [5]]
    assert [jobs[1].key_of(index) for index in range(3)] == ["000001-0", "000001-1", "000001-2"]
    assert jobs[0].key_of(0) == "000000"
