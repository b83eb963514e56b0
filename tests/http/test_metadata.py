"""What files and logs say, over HTTP: enough to make a picture again, or as little as the operator wants."""

import base64
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade.images.metadata import SourceType
from tests.http.serving import ROOT, SMALL, Server, data_url
from tests.metadata import read_as_a1111, read_as_civitai, read_record, read_texts
from tests.readme import block

QUICK = {"prompt": "a leaf", "steps_prior": 1, "steps_decoder": 1, "output_format": "png"}
SECRET = "a clandestine apple"
ASKED = {
    "prompt": "a red apple, 夜\non green: 🦊",
    "negative_prompt": "a leaf",
    "steps_prior": 2,
    "steps_decoder": 1,
    "num_images": 2,
}


def files(prediction: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(output.partition(",")[2]) for output in prediction["output"]]


def noise(seed: int, edge: int = 128) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (edge // 16, edge // 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((edge, edge)).save(file, "PNG")
    return file.getvalue()


def square() -> bytes:
    """A mask."""
    image = Image.new("L", (128, 128))
    image.paste(255, (32, 32, 96, 96))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("ending", ["webp", "jpg", "png"])
def test_what_a_file_says_makes_it_again(server: Server, ending: str) -> None:
    """To the byte, from what the second file says alone; nothing is given of what has a default."""
    made = files(server.predict(**ASKED, output_format=ending, aspect_ratio="3:2"))
    record = read_record(made[1])
    assert {name: record["inputs"][name] for name in ASKED} == ASKED
    assert record["picture"]["index"] == 1
    assert record["picture"]["seed"] == (record["inputs"]["seed"] + 1) % 2**32
    assert files(server.predict(**record["inputs"])) == made


@pytest.mark.parametrize(
    ("inputs", "images"),
    [
        ({"prompt_strength": 0.5}, {"image": noise(1)}),
        ({"outpaint": [16, 0, 0, 32]}, {"image": noise(1), "mask": square()}),
        ({"image_prompt_strengths": [1.5, 0.5]}, {"image_prompts": [noise(1), noise(2)]}),
        ({"control_scales": [0.5, 1], "control_ranges": [0, 0.5]}, {"control_images": [noise(1), noise(2)]}),
        ({"prompt_strength": 1}, {"image": noise(1), "image_prompts": [noise(2)], "control_images": [noise(3)]}),
    ],
    ids=["image", "outpaint", "image_prompts", "control_images", "all"],
)
def test_with_images_a_file_says_which_they_were(
    server: Server, inputs: dict[str, Any], images: dict[str, bytes | list[bytes]]
) -> None:
    """Who has them puts each where its digest says, and gets the same files."""
    sent = {
        name: [data_url(one) for one in content] if isinstance(content, list) else data_url(content)
        for name, content in images.items()
    }
    made = files(server.predict(**QUICK, **inputs, **sent))
    record = read_record(made[0])
    contents = [one for content in images.values() for one in (content if isinstance(content, list) else [content])]
    known = {hashlib.sha256(content).hexdigest(): content for content in contents}
    again: dict[str, Any] = {}
    for file in record["files"]:
        url = data_url(known[file["sha256"]])
        if "index" in file:
            again.setdefault(file["input"], []).append(url)
        else:
            again[file["input"]] = url
    assert again == sent
    assert files(server.predict(**record["inputs"], **again)) == made


def test_other_software_reads_it(server: Server) -> None:
    (made,) = files(server.predict(**{**SMALL, **ASKED, "seed": 7, "num_images": 1}))
    texts = read_texts(made)
    for read in (read_as_a1111, read_as_civitai):
        found = read(texts.parameters)
        assert (found.prompt, found.negative) == (ASKED["prompt"], ASKED["negative_prompt"])
        asked = {"Steps": "2", "Sampler": "DDPM", "Seed": "7", "Size": "64x64", "Model": "Stable Cascade mini"}
        assert asked.items() <= found.settings.items()
    assert texts.source == SourceType.CREATED


def test_the_code_of_the_page(server: Server, tmp_path: Path) -> None:
    (made,) = files(server.predict(**SMALL))
    (tmp_path / "apple.webp").write_bytes(made)
    code = block(ROOT / "docs" / "metadata.md", "python", "Image.open").replace("http://localhost:5000", server.url)
    code += 'print(again["output"][0])'
    server.wait_until("READY")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said, again = done.stdout.splitlines()
    assert said == "Picture 1 of 1"
    assert files({"output": [again]}) == [made]


def test_neither_files_nor_logs_tell_the_prompt(cautious: Server) -> None:
    """One that fits, one that is cut, one of a request that fails, and what else one could think of."""
    image = noise(1)
    digest = hashlib.sha256(image).hexdigest()
    logs = ""
    for ending in ("webp", "jpg", "png"):
        for prompt in (SECRET, f"{'word ' * 400} {SECRET}"):
            inputs = {**SMALL, "prompt": prompt, "negative_prompt": prompt, "image": data_url(image)}
            prediction = cautious.predict(**inputs, output_format=ending)
            logs += prediction["logs"]
            (made,) = files(prediction)
            texts = read_texts(made)
            assert texts.source == SourceType.EDITED
            record = json.loads(texts.description)
            assert not {"prompt", "negative_prompt"} & set(record["inputs"])
            assert record["files"] == [{"input": "image"}]
            assert texts.parameters.startswith("Steps: 1, Sampler: DDPM, ")
            for told in (SECRET, digest):
                assert not any(told.encode(code) in made for code in ("utf-8", "utf-16-be", "utf-16-le"))
    for wrong in ({"image": data_url(b"nothing")}, {"outpaint": [1]}, {"prompt": [SECRET]}, {"steps_prior": SECRET}):
        cautious.wait_until("READY")
        cautious.post({**SMALL, "prompt": f"{'word ' * 4000} {SECRET}", "negative_prompt": SECRET, **wrong})
    cautious.wait_until("READY")
    logs += cautious.log.read_text()
    assert "exceeds 300 tokens" in logs
    assert "clandestine" not in logs
