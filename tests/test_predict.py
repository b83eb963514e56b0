"""The Predictor, as Cog calls it, on the miniature; and what Cog reads without running it: signature and cog.yaml."""

import ast
import base64
import contextlib
import ctypes
import gc
import inspect
import io
import itertools
import random
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cog import BaseRunner, CancelationException
from cog import Path as CogPath
from cog.input import FieldInfo
from cog.predictor import load_predictor_from_ref
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade.limits import LIMITS
from cascade.request import Request
from cascade.safety import SafetyChecker
from cascade.weights import WeightsError
from predict import RATIOS, Predictor
from serving.early import find_weights
from tests.metadata import read_record
from tests.test_safety import save_classifier

ROOT = Path(__file__).parent.parent
# As Replicate's clients do it, line by line, the last first.
PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")
# Taken here because Cog's server puts the bare defaults into the signature before it calls `run`.
INPUTS = {name: one for name, one in inspect.signature(Predictor.run).parameters.items() if name != "self"}
DEFAULTS = {name: parameter.default.default for name, parameter in INPUTS.items()}
TINY = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 1, "output_format": "png"}


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(ROOT / "weights" / "mini"))
        predictor = Predictor()
        predictor.setup()
    return predictor


@pytest.fixture
def metrics(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is recorded: Cog's scope keeps nothing outside of its server."""
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(predictor, "record_metric", recorded.__setitem__)
    return recorded


def run(predictor: Predictor, **given: Any) -> list[Path]:
    """Call ``run`` as Cog does: with the default of every input that is not given."""
    assert set(given) <= set(DEFAULTS)
    return predictor.run(**{**DEFAULTS, **given})


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


# ---- pictures ----


def test_a_picture_is_made_before_any_is_asked_for(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only on a GPU, where the first picture takes longer."""
    service = predictor.service
    wanted: list[Request] = []
    steps = service.cascade.steps
    monkeypatch.setattr(service.cascade, "steps", lambda request: wanted.append(request) or steps(request))
    service.warm_up()
    service.model_thread.submit(lambda: None).result()
    assert not wanted
    progress: list[Any] = []

    def noted(request: Request) -> Iterator[Any]:
        for one in steps(request):
            progress.append(one)
            yield one

    monkeypatch.setattr(service.cascade, "steps", noted)
    monkeypatch.setattr(service, "_asked", threading.Event())
    service.model_thread.submit(service._make_unasked).result()
    assert [one.image is not None for one in progress].count(True) == 1
    assert progress[-1].image.size == (256, 256)
    service._asked.set()
    progress.clear()
    service.model_thread.submit(service._make_unasked).result()
    assert progress == []


def test_the_picture_that_nobody_asked_for_ends_when_somebody_asks(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = predictor.service
    monkeypatch.setattr(service, "_asked", threading.Event())
    begun, steps, seen = threading.Event(), service.cascade.steps, []

    def slow(request: Request) -> Iterator[Any]:
        for one in steps(request):
            seen.append(one)
            begun.set()
            service._asked.wait(60)
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(service.cascade, "steps", slow)
        unasked = service.model_thread.submit(service._make_unasked)
        assert begun.wait(60)
    (file,) = run(predictor, **TINY, seed=1)
    unasked.result()
    assert len(seen) == 1
    made = read(file)
    assert (read(run(predictor, **TINY, seed=1)[0]) == made).all()


def test_a_prediction_begins_when_the_picture_that_nobody_asked_for_has_ended(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that fails at once: after an error, the GPU is asked whether it works, which breaks the capture of a graph."""
    service = predictor.service
    ended, touched = threading.Event(), threading.Event()
    seen: list[bool] = []

    def unasked() -> None:
        service._asked.wait(60)
        touched.wait(0.3)
        ended.set()

    def noted(*_: Any) -> None:
        seen.append(ended.is_set())
        touched.set()
        raise ValueError("no previewer")

    monkeypatch.setattr(service, "_asked", threading.Event())
    monkeypatch.setattr(service, "_make", noted)
    monkeypatch.setattr(service, "_look_after_gpu", lambda: seen.append(ended.is_set()))
    service.model_thread.submit(unasked)
    with pytest.raises(ValueError, match="no previewer"):
        run(predictor, **TINY)
    assert seen == [True, True]


def test_a_picture_that_nobody_asked_for_may_fail(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = predictor.service
    monkeypatch.setattr(service, "_asked", threading.Event())

    def failing(request: Request) -> Iterator[Any]:
        raise RuntimeError("CUDA out of memory")
        yield

    monkeypatch.setattr(service.cascade, "steps", failing)
    with caplog.at_level("INFO"):
        service._make_unasked()
    assert "No picture was made at the start, so the first takes longer: CUDA out of memory" in caplog.text


@pytest.mark.slow
def test_defaults_give_one_picture_of_the_native_size(predictor: Predictor) -> None:
    (file,) = run(predictor)
    picture = Image.open(file)
    assert file.name == "out-0.webp"
    assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (256, 256))


@pytest.mark.slow
def test_every_input_reaches_the_picture(predictor: Predictor) -> None:
    base = {**TINY, "prompt": "a red apple", "seed": 3, "guidance_scale_prior": 4, "guidance_scale_decoder": 2}
    before = read(run(predictor, **base)[0])
    for change in (
        {"prompt": "a blue sky"},
        {"negative_prompt": "red"},
        {"seed": 4},
        {"steps_prior": 1},
        {"steps_decoder": 3},
        {"guidance_scale_prior": 9},
        {"guidance_scale_decoder": 9},
    ):
        (file,) = run(predictor, **{**base, **change})
        assert (read(file) != before).any(), change
    assert (read(run(predictor, **base)[0]) == before).all()


@pytest.mark.slow
def test_the_prompt_is_used_as_it_was_given(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Request] = []
    steps = predictor.service.cascade.steps
    monkeypatch.setattr(predictor.service.cascade, "steps", lambda request: requests.append(request) or steps(request))
    for prompt in ("", " A  red apple, ", "x" * 5000):
        (file,) = run(predictor, **TINY, prompt=prompt, negative_prompt=prompt)
        assert (requests[-1].prompt, requests[-1].negative_prompt) == (prompt, prompt)
        assert read_record(file)["inputs"]["prompt"] == prompt


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"width": 100, "height": 72}, (100, 72)),
        ({"width": 72}, (72, 256)),
        ({"height": 65, "aspect_ratio": "16:9"}, (384, 65)),
        ({"aspect_ratio": "9:21"}, (168, 392)),
        ({"aspect_ratio": "9:21", "width": 64, "height": 80}, (64, 80)),
    ],
)
def test_size(predictor: Predictor, asked: dict[str, Any], expected: tuple[int, int]) -> None:
    (file,) = run(predictor, **{"steps_prior": 1, "steps_decoder": 1, **asked})
    assert Image.open(file).size == expected


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    inputs=st.fixed_dictionaries(
        {
            "prompt": st.text(max_size=50),
            "width": st.integers(64, 200),
            "height": st.integers(64, 200),
            "steps_prior": st.integers(1, 3),
            "steps_decoder": st.integers(1, 3),
        },
        optional={
            "negative_prompt": st.text(max_size=50),
            "num_images": st.integers(1, 4),
            "guidance_scale_prior": st.floats(0, 20),
            "guidance_scale_decoder": st.floats(0, 20),
            "seed": st.integers(),
        },
    )
)
def test_a_request_to_the_old_container_gives_exactly_that_size(predictor: Predictor, inputs: dict[str, Any]) -> None:
    files = run(predictor, **inputs)
    assert [file.name for file in files] == [f"out-{i}.webp" for i in range(inputs.get("num_images", 1))]
    assert {Image.open(file).size for file in files} == {(inputs["width"], inputs["height"])}


def test_ratios_are_replicate_s() -> None:
    assert RATIOS == ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]


@pytest.mark.parametrize(("ending", "kind"), [("webp", "WEBP"), ("jpg", "JPEG"), ("png", "PNG")])
def test_formats_and_quality(predictor: Predictor, ending: str, kind: str) -> None:
    lengths, pictures = [], []
    for quality in (0, 100):
        (file,) = run(predictor, **{**TINY, "output_format": ending, "output_quality": quality}, seed=1)
        assert (file.name, Image.open(file).format) == (f"out-0.{ending}", kind)
        lengths.append(file.stat().st_size)
        pictures.append(read(file))
    if ending == "png":
        assert (pictures[0] == pictures[1]).all()
    else:
        assert lengths[0] < lengths[1] - 1000


@pytest.mark.slow
def test_what_a_file_says_makes_the_same_picture_again(predictor: Predictor) -> None:
    asked = {"prompt": "a red apple", "negative_prompt": "a leaf", "width": 72, "height": 64, "output_format": "png"}
    first, second = run(predictor, **asked, steps_prior=2, num_images=2, seed=6)
    record = read_record(second)
    assert record["model"]["name"] == "Stable Cascade mini"
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["versions"]["cascade"])
    assert record["picture"] == {"index": 1, "seed": 7, "width": 72, "height": 64}
    assert read_record(first)["picture"]["seed"] == record["inputs"]["seed"] == 6
    assert {name: record["inputs"][name] for name in asked} == asked
    picture = read(second)
    assert set(record["inputs"]) >= {"steps_prior", "steps_decoder", "guidance_scale_prior", "guidance_scale_decoder"}
    (again,) = run(predictor, **{**record["inputs"], "seed": record["picture"]["seed"], "num_images": 1})
    assert abs(read(again) - picture).max() <= 1


# ---- images ----


@pytest.fixture(scope="module")
def apple(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a red apple on yellow, as a client's would be."""
    (file,) = run(predictor, prompt="a red apple on a yellow background", seed=1, output_format="png")
    return Path(shutil.copy(file, tmp_path_factory.mktemp("apple")))


def colours(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The mean colours of the middle and of the corners."""
    pixels = read(file)
    corners = [
        pixels[rows, columns] for rows in (slice(24), slice(-24, None)) for columns in (slice(24), slice(-24, None))
    ]
    return pixels[88:168, 88:168].mean((0, 1)), np.mean(corners, (0, 1, 2))


@pytest.mark.slow
def test_variation(predictor: Predictor, apple: Path) -> None:
    """Without a word: what the image shows, in other pixels."""
    few = {"steps_prior": 8, "steps_decoder": 3, "output_format": "png"}
    for seed in range(2):
        (file,) = run(predictor, prompt="", image_prompts=[CogPath(apple)], seed=seed, **few)
        middle, corners = colours(file)
        assert middle[0] > middle[1:].max() + 40
        assert corners[:2].min() > corners[2] + 40
        assert np.abs(read(file) - read(apple)).mean() > 3


@pytest.mark.slow
def test_image_to_image_leaves_the_less_the_stronger_it_is(predictor: Predictor, apple: Path) -> None:
    """Without a word, so that nothing but the image decides."""
    inputs = {"prompt": "", "image": CogPath(apple), "output_format": "png", "num_images": 2}
    inputs |= {"steps_prior": 10, "steps_decoder": 2}
    distances = []
    for strength in (0.0, 0.2, 0.5, 1.0):
        files = run(predictor, **inputs, prompt_strength=strength, seed=0)
        distances.append(np.mean([np.abs(read(file) - read(apple)).mean() for file in files]))
        if strength == 0.2:
            assert all(colours(file)[0][0] > colours(file)[0][1:].max() + 40 for file in files)
    assert distances == sorted(set(distances))
    assert distances[1] < 0.1 * distances[-1]


@pytest.mark.slow
def test_what_a_file_says_of_images(predictor: Predictor, apple: Path) -> None:
    (file,) = run(predictor, **TINY, image=CogPath(apple), prompt_strength=0.5)
    record = read_record(file)
    assert record["inputs"]["prompt_strength"] == 0.5
    assert [(file["input"], file.get("index")) for file in record["files"]] == [("image", None)]
    assert not {"image_prompt_strengths", "control_types"} & set(record["inputs"])
    (file,) = run(predictor, **TINY, image_prompts=[CogPath(apple)] * 2, image_prompt_strengths=[1.5])
    record = read_record(file)
    assert record["inputs"]["image_prompt_strengths"] == [1.5]
    assert [(file["input"], file.get("index")) for file in record["files"]] == [
        ("image_prompts", 0),
        ("image_prompts", 1),
    ]
    assert "prompt_strength" not in record["inputs"]


@pytest.mark.slow
def test_a_strength_for_each_image_prompt(predictor: Predictor, apple: Path) -> None:
    images = {"image_prompts": [CogPath(apple)] * 2, "seed": 1}
    (both,) = run(predictor, **TINY, **images, image_prompt_strengths=[1, 0.5])
    assert read_record(both)["inputs"]["image_prompt_strengths"] == [1, 0.5]
    weighed = read(both)
    (swapped,) = run(predictor, **TINY, **images, image_prompt_strengths=[0.5, 1])
    assert np.abs(read(swapped) - weighed).max() <= 1  # it is the same image, in another order
    (file,) = run(predictor, **TINY, **images, image_prompt_strengths=[1])
    for_all = read(file)
    assert (for_all != weighed).any()
    (default,) = run(predictor, **TINY, **images)
    assert (read(default) == for_all).all()


@pytest.mark.slow
def test_inpainting(predictor: Predictor, apple: Path, tmp_path: Path) -> None:
    """Another apple in the middle; around it, not a pixel of another colour."""
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 192, 192))
    mask.save(tmp_path / "mask.png")
    inputs = {"image": CogPath(apple), "mask": CogPath(tmp_path / "mask.png"), "output_format": "png"}
    inputs |= {"steps_prior": 10, "steps_decoder": 3}
    (file,) = run(predictor, prompt="a blue butterfly on a yellow background", seed=0, **inputs)
    outside = np.asarray(mask) == 0
    assert (read(file)[outside] == read(apple)[outside]).all()
    assert [file["input"] for file in read_record(file)["files"]] == ["image", "mask"]
    red = lambda file: read(file)[88:168, 88:168, 0].mean() - read(file)[88:168, 88:168, 2].mean()  # noqa: E731
    assert red(file) < red(apple) - 60


@pytest.mark.slow
def test_outpainting(predictor: Predictor, apple: Path) -> None:
    """The background goes on."""
    asked = {"prompt": "a red apple on a yellow background", "outpaint": [0, 0, 64, 40], "output_format": "png"}
    (file,) = run(predictor, image=CogPath(apple), seed=0, steps_prior=10, steps_decoder=3, **asked)
    picture = read(file)
    assert picture.shape == (296, 320, 3)
    assert (picture[:256, :256] == read(apple)).all()
    assert (picture[-20:].mean((0, 1))[:2] > picture[-20:].mean((0, 1))[2] + 40).all()


@pytest.fixture(scope="module")
def controlled(mini_with_controlnets: Path) -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        return set_up(mini_with_controlnets, patch)


@pytest.mark.slow
def test_controls(controlled: Predictor, apple: Path) -> None:
    """Each input counts, and is recorded; one value serves for all images."""
    images = {"control_images": [CogPath(apple)] * 2, "seed": 1, "steps_prior": 4}
    base = {**TINY, "prompt": "a red apple", "width": 128, "height": 128, **images}
    pictures = []
    for inputs in (
        {},
        {"control_types": ["super_resolution"]},
        {"control_types": ["canny", "super_resolution"]},
        {"control_scales": [0.5]},
        {"control_scales": [0.5, 1.25]},
        {"control_ranges": [0.5, 1]},
        {"control_ranges": [0, 0.25, 0, 0.75]},
        {"control_scales": [0]},
    ):
        (file,) = run(controlled, **{**base, **inputs})
        pictures.append(read(file).tobytes())
    assert len(set(pictures)) == len(pictures)
    record = read_record(file)
    assert record["inputs"]["control_scales"] == [0]
    assert [file["input"] for file in record["files"]] == ["control_images"] * 2
    (file,) = run(controlled, **{**base, "control_images": None})
    assert read(file).tobytes() == pictures[-1]


@pytest.mark.slow
def test_upscaling(controlled: Predictor, metrics: dict[str, Any], apple: Path, tmp_path: Path) -> None:
    Image.open(apple).crop((0, 0, 100, 75)).save(tmp_path / "small.png")
    inputs = {"steps_prior": 2, "steps_decoder": 1, "output_format": "png", "upscale": True}
    (file,) = run(controlled, **inputs, image=CogPath(tmp_path / "small.png"))
    assert Image.open(file).size == (200, 150)
    record = read_record(file)
    assert (record["inputs"]["guidance_scale_prior"], record["inputs"]["upscale"]) == (1, True)
    (again,) = run(controlled, **record["inputs"], image=CogPath(tmp_path / "small.png"))
    assert read_record(again) == record
    (file,) = run(controlled, **inputs, image=CogPath(tmp_path / "small.png"), guidance_scale_prior=3)
    assert read_record(file)["inputs"]["guidance_scale_prior"] == 3


@pytest.mark.slow
def test_time_for_controls_is_told(controlled: Predictor, monkeypatch: pytest.MonkeyPatch, apple: Path) -> None:
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(controlled, "record_metric", recorded.__setitem__)
    run(controlled, **TINY, control_images=[CogPath(apple)])
    assert recorded["seconds.input_images"] > 0


@pytest.mark.slow
def test_previews(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, checker: SafetyChecker) -> None:
    """One after every step of Stage C, of every picture; none that the safety checker flags; none in the end."""
    seen: list[list[str]] = []

    def record(name: str, value: Any) -> None:
        if name == "previews":
            seen.append(value)

    monkeypatch.setattr(predictor, "record_metric", record)
    asked = {**TINY, "width": 128, "height": 64, "steps_prior": 3, "num_images": 2}
    run(predictor, **asked)
    assert not seen
    run(predictor, **asked, previews=True)
    *shown, last = seen
    assert [len(previews) for previews in shown] == [2, 2, 2]
    assert last == []
    assert len({preview for previews in shown for preview in previews}) == 6
    for preview in shown[-1]:
        header, data = preview.split(",")
        assert header == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("JPEG", (24, 16))
    seen.clear()
    checker.classifier.classifier.bias.data[1] = 100
    with pytest.raises(ValueError, match="flagged every picture"):
        run(predictor, **asked, previews=True)
    assert seen == [[]] * 4


@pytest.mark.slow
def test_time_for_images_is_told(predictor: Predictor, metrics: dict[str, Any], apple: Path) -> None:
    """Each time, for itself: what the text and the images take is what the first and a later request like it say."""
    images = {"image": CogPath(apple), "image_prompts": [CogPath(apple)]}
    for _ in range(2):
        metrics.clear()
        run(predictor, **TINY, **images)
        assert min(metrics[f"seconds.{stage}"] for stage in ("text", "input_images", "prior", "decoder")) > 0
    metrics.clear()
    run(predictor, **TINY)
    assert "seconds.input_images" not in metrics
    encoder, wait = predictor.service.cascade.effnet, 1.0  # seconds: on a busy machine, the text takes some tenths
    with encoder.register_forward_pre_hook(lambda *_: time.sleep(wait)):
        run(predictor, **TINY, **images)
    assert metrics["seconds.input_images"] > wait > metrics["seconds.text"]


def test_previews_need_a_previewer(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    cascade = predictor.service.cascade
    monkeypatch.setattr(cascade, "planner", replace(cascade.planner, previewer=False))
    called: list[int] = []
    text_encoder = predictor.service.cascade.text.encoder
    with text_encoder.register_forward_pre_hook(lambda *_: called.append(1)):
        with pytest.raises(ValueError, match=r"^This model has no previewer, which previews need; "):
            run(predictor, **TINY, previews=True)
        assert not called
        assert len(run(predictor, **TINY)) == 1


@pytest.mark.slow
def test_a_mask_is_read_once(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, apple: Path, tmp_path: Path
) -> None:
    Image.new("L", (256, 256), "white").save(tmp_path / "mask.png")
    read: list[str] = []
    convert = Image.Image.convert

    def watched(image: Image.Image, mode: str | None = None, *args: Any, **options: Any) -> Image.Image:
        if mode == "L":
            read.append(image.mode)
        return convert(image, mode, *args, **options)

    monkeypatch.setattr(Image.Image, "convert", watched)
    run(predictor, steps_prior=1, steps_decoder=1, image=CogPath(apple), mask=CogPath(tmp_path / "mask.png"))
    assert len(read) == 1


# ---- seeds ----


def test_several_pictures_have_seeds_of_their_own(predictor: Predictor, metrics: dict[str, Any]) -> None:
    files = run(predictor, **TINY, num_images=3, seed=7)
    assert metrics["seeds"] == [7, 8, 9]
    pictures = [read(file) for file in files]
    (alone,) = run(predictor, **TINY, seed=9)
    assert abs(pictures[2] - read(alone)).max() <= 1
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.slow
def test_no_seed_is_a_new_seed_of_32_bits(
    predictor: Predictor, metrics: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    seeds = []
    for _ in range(4):
        torch.manual_seed(0)
        with caplog.at_level("INFO", "serving.service"):
            run(predictor, **TINY)
        seeds += metrics["seeds"]
        assert f"Seeds: {seeds[-1]}\n" in caplog.text
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert max(seeds) >= 2**16  # all four below: once in 5e19 times


def test_seed_zero_is_a_seed(predictor: Predictor, metrics: dict[str, Any]) -> None:
    pictures = [read(run(predictor, **TINY, seed=0)[0]) for _ in range(2)]
    assert metrics["seeds"] == [0]
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.slow
def test_seeds_go_on_from_0_so_that_each_can_be_asked_for(predictor: Predictor, metrics: dict[str, Any]) -> None:
    files = run(predictor, **TINY, num_images=3, seed=2**32 - 2)
    assert metrics["seeds"] == [2**32 - 2, 2**32 - 1, 0]
    assert [file.name for file in files] == ["out-0.png", "out-1.png", "out-2.png"]
    pictures = [read(file) for file in files]
    for index, seed in enumerate(metrics["seeds"]):
        (alone,) = run(predictor, **TINY, seed=seed)
        assert abs(read(alone) - pictures[index]).max() <= 1


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1e23])
def test_any_whole_number_is_a_seed_of_which_32_bits_count(
    predictor: Predictor, metrics: dict[str, Any], seed: float
) -> None:
    (file,) = run(predictor, **TINY, seed=seed)
    used = int(seed) % 2**32
    assert metrics["seeds"] == [used]
    picture = read(file)
    assert (read(run(predictor, **TINY, seed=used)[0]) == picture).all()


def test_what_the_process_shares_is_left_alone(predictor: Predictor) -> None:
    def shared() -> list[Any]:
        flags = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.is_grad_enabled())
        return [flags, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    before = shared()
    run(predictor, **TINY, seed=1)
    assert shared() == before


# ---- inputs ----


def test_cog_may_put_bare_defaults_into_the_signature(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server does, before it calls ``run``, so ranges cannot be looked up there."""
    monkeypatch.setattr(Predictor.run, "__defaults__", tuple(DEFAULTS.values()))
    assert len(predictor.run(**TINY)) == 1
    with pytest.raises(ValueError, match="whole number from 64 to 4096"):
        predictor.run(width=63)


# ---- files, logs, metrics ----


def test_the_last_files_are_removed_when_the_next_run_starts(predictor: Predictor) -> None:
    (first,) = run(predictor, **TINY)
    assert first.is_file()
    (second,) = run(predictor, **TINY)
    assert not first.parent.exists()
    assert list(second.parent.iterdir()) == [second]
    with pytest.raises(ValueError, match="seed"):
        run(predictor, seed=0.5)
    assert not second.parent.exists()


@pytest.mark.slow
def test_metrics(predictor: Predictor, metrics: dict[str, Any]) -> None:
    run(predictor, **{**TINY, "width": 80}, num_images=2)
    assert metrics["pixels"] == 2 * 80 * 64
    assert metrics["flagged"] == 0
    assert 0.05 < metrics["peak_memory_gb"] < 100
    seconds = {name.removeprefix("seconds."): value for name, value in metrics.items() if name.startswith("seconds.")}
    assert set(seconds) == {"text", "prior", "decoder", "encoding"}
    assert all(value > 0 for value in seconds.values())
    few = seconds["prior"]
    run(predictor, **{**TINY, "steps_prior": 30})
    assert metrics["seconds.prior"] > 2 * few


def test_replicate_finds_the_progress(predictor: Predictor, capfd: pytest.CaptureFixture[str]) -> None:
    run(predictor, **{**TINY, "steps_prior": 3, "steps_decoder": 2})
    found = [match.groups() for line in capfd.readouterr().err.split("\n") if (match := PROGRESS.match(line))]
    # The text, five steps and the picture.
    assert found == [*((str(round(100 * i / 7)), str(i), "7") for i in range(1, 7)), *[("100", "7", "7")] * 2]


def test_the_model_runs_on_one_thread_whichever_thread_asks(predictor: Predictor, checker: SafetyChecker) -> None:
    threads: set[int] = set()
    networks = (
        predictor.service.cascade.text.encoder,
        predictor.service.cascade.prior,
        predictor.service.cascade.decoder,
        checker.classifier,
    )
    called = dict.fromkeys(networks, 0)

    def note(network: torch.nn.Module, *_: object) -> None:
        called[network] += 1
        threads.add(threading.get_ident())

    with contextlib.ExitStack() as hooks:
        for network in networks:
            hooks.enter_context(network.register_forward_pre_hook(note))
        for _ in range(2):
            thread = threading.Thread(target=run, args=[predictor], kwargs=TINY)
            thread.start()
            thread.join()
    assert list(called.values()) == [2, 4, 2, 2]
    assert len(threads) == 1


# ---- what goes wrong ----


def tensors() -> int:
    """How many numbers all tensors hold together."""
    gc.collect()
    return sum(one.numel() for one in gc.get_objects() if issubclass(type(one), torch.Tensor))


@pytest.mark.slow
def test_cancel(predictor: Predictor) -> None:
    """As Cog does it: its exception is set from another thread, while a step is computed."""
    before = read(run(predictor, **TINY, seed=1)[0])
    held = tensors()
    steps: list[int] = []
    begun = threading.Event()

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            begun.set()

    caught: list[BaseException] = []

    def work() -> None:
        try:
            run(predictor, steps_prior=50)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    with predictor.service.cascade.prior.register_forward_pre_hook(count):
        thread.start()
        assert begun.wait(10)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(CancelationException))
        done = len(steps)
        thread.join(10)
    assert [type(error) for error in caught] == [CancelationException]
    assert len(steps) <= done + 1
    assert not Path(predictor.service.outputs.name).exists()
    assert tensors() == held, "not even the error's traceback may hold any"
    assert (read(run(predictor, **TINY, seed=1)[0]) == before).all()


@pytest.mark.slow
def test_cancel_between_two_pictures(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tensors()

    def save(image: Image.Image, path: Path, *_: object) -> None:
        image.save(path)
        raise CancelationException

    with monkeypatch.context() as patch:
        patch.setattr("serving.service.save_picture", save)
        with pytest.raises(CancelationException):
            run(predictor, **TINY, num_images=2)
    assert tensors() == held
    assert not Path(predictor.service.outputs.name).exists()
    assert len(run(predictor, **TINY)) == 1


def test_what_nobody_expected_is_logged_with_its_traceback(
    predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a kernel failed")

    with (
        predictor.service.cascade.decoder.register_forward_pre_hook(fail),
        pytest.raises(RuntimeError, match="a kernel"),
    ):
        run(predictor, **TINY)
    assert "Traceback" in caplog.text
    assert "decoder.py" in caplog.text
    assert not Path(predictor.service.outputs.name).exists()
    assert len(run(predictor, **TINY)) == 1


FREE = itertools.count(2**30, 2**30)


@pytest.fixture
def small_memory(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stage B fails, as on a GPU whose memory is full, above so many latents at a time: the list's only number."""
    room = [0]
    # More is free than in the test before, of which nothing is remembered then.
    free = next(FREE)
    monkeypatch.setattr("cascade.running.runner.usable", lambda _: free)

    def forward(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        if x.shape[0] * x.shape[-2] * x.shape[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with predictor.service.cascade.decoder.register_forward_pre_hook(forward):
        yield room


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "batches"),
    [(3, ["4 pictures at", "with 2 at"]), (1.5, ["4 pictures", "with 2 at", "2 pictures", "with 1 at"])],
)
def test_pictures_for_which_memory_does_not_suffice_at_once_are_made_in_parts(
    predictor: Predictor, small_memory: list[int], caplog: pytest.LogCaptureFixture, room: float, batches: list[str]
) -> None:
    asked = {**TINY, "width": 128, "height": 96, "guidance_scale_decoder": 0, "num_images": 4, "seed": 3}
    small_memory[0] = 4 * 32 * 24
    expected = [read(file) for file in run(predictor, **asked)]
    assert "Out of memory" not in caplog.text
    small_memory[0] = int(room * 32 * 24)
    for file, picture in zip(run(predictor, **asked), expected, strict=True):
        assert np.abs(read(file) - picture).max() <= 1
    lines = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    assert re.search(".*".join(batches), " ".join(lines))
    assert len(lines) == len(batches) / 2
    # What has been found out is not tried again.
    run(predictor, **asked)
    assert caplog.text.count("Out of memory") == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "fits"),
    [
        (0.6, "left; one of 88x64 would fit."),
        (0.34, "left; one of 64x64 would fit."),
        (0.2, "left, and so does one of 64x64: something else must be using it."),
    ],
)
def test_memory_that_does_not_suffice(predictor: Predictor, small_memory: list[int], room: float, fits: str) -> None:
    held = tensors()
    small_memory[0] = int(room * 32 * 24)
    asked = {**TINY, "width": 128, "height": 96, "guidance_scale_decoder": 0}
    with pytest.raises(ValueError, match="memory") as caught:
        run(predictor, **asked, num_images=4)
    assert str(caught.value) == f"A picture of 128x96 needs more memory than the GPU has {fits}"
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert not Path(predictor.service.outputs.name).exists()
    assert tensors() == held
    if smaller := re.search(r"one of (\d+)x(\d+) would", str(caught.value)):
        width, height = map(int, smaller.groups())
        assert len(run(predictor, **{**asked, "width": width, "height": height}, num_images=4)) == 4


def test_memory_that_does_not_suffice_for_a_mask(predictor: Predictor, small_memory: list[int], tmp_path: Path) -> None:
    """With which pictures have the image's size, so that a smaller image would fit."""
    small_memory[0] = int(0.6 * 32 * 24)
    for name, mode in (("image", "RGB"), ("mask", "L")):
        Image.new(mode, (128, 96), "white").save(tmp_path / f"{name}.png")
    inputs = {name: CogPath(tmp_path / f"{name}.png") for name in ("image", "mask")}
    with pytest.raises(ValueError, match="of 128x96 needs more memory than the GPU has left; one of 88x64 would fit"):
        run(predictor, steps_prior=2, steps_decoder=1, guidance_scale_decoder=0, **inputs)


def test_healthcheck(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Predictor().healthcheck() is False
    assert predictor.healthcheck() is True
    monkeypatch.setattr("serving.service.DISK_NEEDED", 2**62)
    assert predictor.healthcheck() is False


# ---- safety ----


@pytest.fixture
def checker(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SafetyChecker:
    """Flags nothing, until its bias is changed."""
    checker = SafetyChecker.load(save_classifier(tmp_path / "safety_checker", {"normal": 50.0, "nsfw": 0.0}))
    monkeypatch.setattr(predictor.service, "safety", checker)
    return checker


@pytest.mark.slow
def test_flagged_pictures_are_dropped_and_the_others_kept(
    predictor: Predictor, checker: SafetyChecker, metrics: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    asked = {**TINY, "num_images": 3, "seed": 10}
    files = run(predictor, **asked)
    assert len(files) == 3
    assert metrics["seconds.safety"] > 0
    pictures = [read(file) for file in files]
    # The bias is put between the logits of the likeliest and the second one, so that the likeliest alone is flagged.
    checker.classifier.classifier.bias.data.zero_()
    with torch.no_grad():
        inputs = checker.processor([Image.open(file) for file in files], return_tensors="pt").pixel_values
        margins = checker.classifier(inputs).logits.diff(dim=1)[:, 0]
    flagged = int(margins.argmax())
    checker.classifier.classifier.bias.data[1] = -margins.sort().values[1:].mean()

    with caplog.at_level("WARNING", "serving.service"):
        files = run(predictor, **asked)
    kept = [index for index in range(3) if index != flagged]
    assert [file.name for file in files] == [f"out-{index}.png" for index in kept]
    assert all((read(file) == pictures[index]).all() for file, index in zip(files, kept, strict=True))
    assert metrics["seeds"] == [10 + index for index in kept]
    assert (metrics["flagged"], metrics["pixels"]) == (1, 2 * 64 * 64)
    assert f"Picture {flagged} (seed {10 + flagged}) was flagged by the safety checker." in caplog.text


def test_only_when_all_are_flagged_it_is_an_error(
    predictor: Predictor, checker: SafetyChecker, metrics: dict[str, Any]
) -> None:
    checker.classifier.classifier.bias.data[1] = 100
    with pytest.raises(ValueError, match=r"^The safety checker flagged every picture, so none is returned; "):
        run(predictor, **TINY, num_images=2)
    assert metrics["flagged"] == 2
    assert len(metrics["seeds"]) == 2
    assert not Path(predictor.service.outputs.name).exists()
    assert len(run(predictor, **TINY, num_images=2, disable_safety_checker=True)) == 2
    assert metrics["flagged"] == 0


# ---- setup ----


def set_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(folder))
    predictor = Predictor()
    predictor.setup()
    return predictor


@pytest.mark.slow
def test_setup_says_what_it_did(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        predictor = set_up(model_folder, monkeypatch)
    assert re.search(
        rf"Loaded Tiny from {model_folder}, 0\.00 GB, onto cpu as float32, all networks resident, in \d+\.\d s\.",
        caplog.text,
    )
    (seconds,) = re.findall(r"Seconds to load: (.*)\.\n", caplog.text)
    named = dict(one.split() for one in seconds.split(", "))
    assert named.keys() >= {"tokenizer", "text_encoder", "prior", "decoder", "vqgan"}
    assert all(float(value) >= 0 for value in named.values())
    assert caplog.text.count("no picture will be checked") == 1
    monkeypatch.setenv("CASCADE_MEMORY", "stream")  # the CPU has no other memory
    assert set_up(model_folder, monkeypatch).service.cascade.runner.description == "all networks resident"
    monkeypatch.setenv("CASCADE_MEMORY", "swap")
    with pytest.raises(
        ValueError, match=r"^CASCADE_MEMORY is 'swap'; it must be one of auto, resident, offload, stream\.$"
    ):
        set_up(model_folder, monkeypatch)
    monkeypatch.delenv("CASCADE_MEMORY")
    for name, value in (("DEVICE", "cuda:7"), ("DEVICE", "gpu"), ("DTYPE", "int8"), ("PRECISION", "fp4")):
        with monkeypatch.context() as patch:
            patch.setenv(f"CASCADE_{name}", value)
            with pytest.raises(ValueError, match=rf"^CASCADE_{name} is '{value}'; it must be one of auto, .*\.$"):
                set_up(model_folder, monkeypatch)
    monkeypatch.setenv("CASCADE_DEVICE", "cpu")
    monkeypatch.setenv("CASCADE_DTYPE", "bfloat16")
    caplog.clear()
    with caplog.at_level("INFO"):
        assert set_up(model_folder, monkeypatch).service.cascade.prior.dtype == torch.bfloat16
    assert "Device: cpu in bfloat16; cpu was asked for, and bfloat16 was asked for." in caplog.text
    monkeypatch.setenv("CASCADE_PRECISION", "int8")
    with caplog.at_level("INFO"):
        assert set_up(model_folder, monkeypatch).service.cascade.precision == "int8"
    assert "onto cpu as bfloat16 with weights in 8 bits, all networks resident" in caplog.text
    monkeypatch.delenv("CASCADE_PRECISION")
    monkeypatch.delenv("CASCADE_DTYPE")
    caplog.clear()
    run(predictor, **TINY)
    assert "checked" not in caplog.text


def test_setup_finds_the_safety_checker(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    checker = save_classifier(folder / "safety_checker", {"normal": 0.0, "nsfw": 50.0})
    with caplog.at_level("INFO"):
        predictor = set_up(folder, monkeypatch)
    assert f"Loaded the safety checker from {checker} in " in caplog.text
    with pytest.raises(ValueError, match="flagged every picture"):
        run(predictor, **TINY)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "checker"])
def test_setup_says_why_it_cannot(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "model"
    if damage in ("truncated", "checker"):
        shutil.copytree(model_folder, folder)
    if damage == "truncated":
        file = folder / "prior" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    if damage in ("empty", "checker"):
        (folder / ("" if damage == "empty" else "safety_checker")).mkdir()
    part = {
        "missing": f"^There is no model folder {folder}. scripts/download-weights and scripts/save-weights make one.$",
        "empty": f"^{folder / 'model.json'} does not exist",
        "truncated": f"^{folder / 'prior'}.* is truncated",
        "checker": "safety_checker/config.json is missing",
    }
    with pytest.raises(WeightsError, match=part[damage]):
        set_up(folder, monkeypatch)


def test_which_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("serving.early.WEIGHTS", tmp_path)
    monkeypatch.delenv("CASCADE_WEIGHTS", raising=False)
    assert find_weights() == tmp_path / "mini"
    (tmp_path / "stable-cascade").mkdir()
    assert find_weights() == tmp_path / "stable-cascade"
    monkeypatch.setenv("CASCADE_WEIGHTS", "/elsewhere")
    assert find_weights() == Path("/elsewhere")


# ---- what Cog reads without running it ----


def test_the_old_container_s_inputs_keep_their_names_and_ranges() -> None:
    ranges = {
        "num_images": (1, 4),
        "steps_prior": (1, 50),
        "steps_decoder": (1, 50),
        "guidance_scale_prior": (0, 20),
        "guidance_scale_decoder": (0, 20),
    }
    for name, bounds in ranges.items():
        assert (INPUTS[name].default.ge, INPUTS[name].default.le) == bounds
    assert INPUTS["width"].default.le == INPUTS["height"].default.le == 4096
    assert {"prompt", "negative_prompt", "width", "height", "seed", *ranges} <= set(INPUTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_literals_are_the_limits(name: str) -> None:
    """Which `run` goes by: Cog reads the literals alone."""
    field, limits = INPUTS[name].default, LIMITS[name]
    element = CogPath if limits.kind is Image.Image else limits.kind
    kind = element if limits.most is None else list[element]
    assert INPUTS[name].annotation == (kind | None if limits.default is None else kind)
    assert field.default == limits.default
    assert type(field.default) is type(limits.default)
    if limits.most is None:  # of a list's elements, Cog's schema has no limits
        assert (field.ge, field.le) == (limits.low, limits.high)
        assert field.choices == (list(limits.choices) if limits.kind is str and limits.choices else None)


def test_all_inputs_have_limits_in_the_same_order() -> None:
    assert list(INPUTS) == list(LIMITS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_input_is_described_with_its_limits(name: str) -> None:
    field, limits = INPUTS[name].default, LIMITS[name]
    assert isinstance(field, FieldInfo)
    assert 20 < len(field.description) < 120
    assert all(
        re.search(rf"(?<!\w){bound}\b", field.description) for bound in (limits.low, limits.high) if bound is not None
    )
    if name != "aspect_ratio":
        assert all(re.search(rf"\b{choice}\b", field.description) for choice in limits.choices)
    if field.default is not None and field.ge is not None:
        assert field.ge <= field.default <= field.le
    if field.choices is not None:
        assert field.default in field.choices


def test_cog_finds_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "predict", sys.modules["predict"])  # which Cog replaces by a module of its own
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    file, name = config["run"].split(":")
    found = load_predictor_from_ref(f"{ROOT / file}:{name}")
    assert isinstance(found, BaseRunner)
    assert "weights" not in inspect.signature(found.setup).parameters


def test_cog_yaml() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["run"] == "predict.py:Predictor"
    assert config["train"] == "train.py:train"
    assert set(config) == {"build", "environment", "run", "train"}
    build = config["build"]
    lines = (ROOT / build["python_requirements"]).read_text().splitlines()
    # Cog reads torch's version from a line that holds nothing else, and chooses the base image by it.
    pins = dict(line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line))
    assert build["sdk_version"] == pins["cog"]
    assert build["gpu"] is True
    assert build["python_version"] == "3.12"
    assert isinstance(build["cuda"], str), "unquoted, 13.0 would be a number"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins["torch"])
    assert set(build) == {"gpu", "cuda", "python_version", "python_requirements", "sdk_version", "run"}
    assert "python -m compileall" in build["run"][0]


@pytest.mark.slow
def test_every_package_of_the_container_is_imported_there() -> None:
    sources = [
        ROOT / "predict.py",
        ROOT / "train.py",
        *(ROOT / "training").rglob("*.py"),
        *(ROOT / "cascade").rglob("*.py"),
        *(ROOT / "serving").rglob("*.py"),
        *(ROOT / "scripts").iterdir(),
    ]
    imported = set()
    elsewhere = ("test", "build_mini_data.py", "evaluate_mini.py", "train_mini.py")
    for source in sources:
        if source.is_file() and source.name not in elsewhere:
            for node in ast.walk(ast.parse(source.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.split(".")[0] for name in names}
    lines = (ROOT / "requirements.in").read_text().splitlines()
    packages = {line.split("==")[0] for line in lines if not line.startswith("#")}
    modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
    assert {package for package in packages if modules.get(package, package) not in imported} == set()


def test_the_container_gets_what_it_needs_and_little_else() -> None:
    ignored = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {".git", ".venv", "tests", "miniature", "docs", "__pycache__"} <= ignored
    needed = {"predict.py", "train.py", "cascade", "serving", "training", "scripts", "weights", "requirements.txt"}
    assert not {*needed, "weights/mini"} & ignored
    assert ".cog" not in ignored, "where Cog puts the schema while it builds, for the container"
    assert not list((ROOT / "weights" / "mini").rglob("*.py")), "--separate-weights wants folders without code"
