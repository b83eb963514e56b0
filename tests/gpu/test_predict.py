"""The Predictor on a GPU: times of every phase, recorded or replayed; and a GPU that is lost."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cog import Path as CogPath
from PIL import Image

from predict import Predictor

ROOT = Path(__file__).parents[2]
DEFAULTS = {
    name: parameter.default.default
    for name, parameter in inspect.signature(Predictor.run).parameters.items()
    if name != "self"
}
SMALL = {"width": 128, "height": 128, "steps_prior": 4, "steps_decoder": 2, "output_format": "png"}


@pytest.fixture(scope="module")
def predictor(mini_with_controlnets: Path) -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(mini_with_controlnets))
        predictor = Predictor()
        predictor.setup()
    return predictor


def run(predictor: Predictor, **given: Any) -> list[Path]:
    return predictor.run(**{**DEFAULTS, **SMALL, **given})


def test_seconds_of_every_phase(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the first request of a kind, in which graphs are recorded, and in the second, in which they are replayed."""
    recorded: dict[str, Any] = {}
    monkeypatch.setattr(predictor, "record_metric", recorded.__setitem__)
    (file,) = run(predictor, prompt="a red apple", seed=1)
    image = tmp_path / "apple.png"
    image.write_bytes(file.read_bytes())
    Image.new("L", (128, 128), "white").save(tmp_path / "mask.png")
    picture, mask = CogPath(image), CogPath(tmp_path / "mask.png")
    kinds: list[dict[str, Any]] = [
        {},
        {"image": picture},
        {"image_prompts": [picture] * 2},
        {"control_images": [picture]},
        {"image": picture, "mask": mask},
        {"image": picture, "upscale": True, "width": None, "height": None},
        {"width": 160, "previews": True, "num_images": 2},
    ]
    for inputs in kinds:
        for _ in range(2):
            recorded.clear()
            assert run(predictor, **inputs)
            seconds = {name: value for name, value in recorded.items() if name.startswith("seconds.")}
            phases = {"text", "prior", "decoder", "encoding"}
            phases |= {"input_images"} if {"image", "image_prompts", "control_images"} & set(inputs) else set()
            phases |= {"previews"} if inputs.get("previews") else set()
            assert set(seconds) == {f"seconds.{phase}" for phase in phases}
            assert min(seconds.values()) > 0


# What comes before: a prediction, and errors that a process survives.
SCRIPT = """
import logging, sys, torch
from predict import Predictor
from tests.gpu.test_predict import run

predictor = Predictor()
assert predictor.healthcheck() is False
predictor.setup()

def memory(*_):
    torch.empty(2**50, dtype=torch.uint8, device="cuda")

def mistake(*_):
    raise RuntimeError("CUDA error: something that looks bad")

def assertion(*_):
    torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")].sum().item()

def fails(hook):
    with predictor.service.cascade.vqgan.up_blocks.register_forward_pre_hook(hook):
        try:
            run(predictor)
        except (RuntimeError, ValueError) as error:
            print(type(error).__name__, str(error).splitlines()[0])
            return
    raise SystemExit("it did not fail")

assert len(run(predictor)) == 1
fails(memory)
fails(mistake)
assert predictor.healthcheck() is True
assert len(run(predictor)) == 1
fails(assertion)
assert [predictor.healthcheck() for _ in range(3)] == [False] * 3
fails(lambda *_: None)
assert predictor.healthcheck() is False
print("as it should be")
"""


def test_a_lost_gpu_fails_the_health_check_for_good_and_other_errors_do_not() -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "CASCADE_WEIGHTS": str(ROOT / "weights" / "mini"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    print(done.stdout, done.stderr)
    assert "as it should be" in done.stdout
    assert done.stderr.count("This process can no longer use the GPU") == 1
