"""What `predict.py` does around its imports, and what it does not import."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from serving import early
from tests.components import save_mini_with_controlnets
from tests.readme import ROOT

# Each takes a tenth of a second to four seconds, and no picture needs it.
NOT_NEEDED = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "matplotlib",
    "pandas",
    "peft",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
}
# Starts as Cog does, and makes pictures of all kinds of inputs.
PROGRAM = """
import json, pathlib, sys
from PIL import Image
from predict import Predictor

predictor = Predictor()
predictor.setup()
started = set(sys.modules)
picture = pathlib.Path(sys.argv[1])
Image.new("RGB", (80, 64)).save(picture)
made = {"steps_prior": 1, "steps_decoder": 1}
images = {name: [picture] for name in ("image_prompts", "control_images")}
adapted = {"ip_adapter_images": [picture], "lora_weights": ["style"]}
for inputs in ({}, {"image": picture, **images}, adapted, {"num_images": 2, "output_format": "png"}):
    predictor.service.predict({"prompt": "a red apple", "width": 64, "height": 64, **made, **inputs}, lambda *_: None)
print(json.dumps([sorted(started), sorted(set(sys.modules) - started)]))
"""


@pytest.mark.slow
def test_what_pictures_do_not_need_is_not_imported(tmp_path: Path) -> None:
    save_mini_with_controlnets(tmp_path / "mini")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "picture.png")]
    variables = {**os.environ, "CASCADE_WEIGHTS": str(tmp_path / "mini"), "CASCADE_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    at_start, later = map(set, json.loads(done.stdout))
    assert "torch" in at_start
    assert not NOT_NEEDED & at_start
    assert not NOT_NEEDED & later


class Driver:
    """Records calls of CUDA's driver, of which `failing` fails."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, getattr(arguments[-1], "value", arguments[-1])))
            if name == "cuDeviceGet":
                arguments[0]._obj.value = 10 + arguments[-1]
            return 1 if name == self.failing else 0

        return call


@pytest.mark.parametrize(("wanted", "number"), [("", 0), ("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_gpu_that_is_woken(wanted: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setenv("CASCADE_DEVICE", wanted)
    early.wake_gpu()
    assert driver.calls == [("cuInit", 0), ("cuDeviceGet", number), ("cuDevicePrimaryCtxRetain", 10 + number)]


def test_no_gpu_is_woken_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    for wanted in ("cpu", "mps", "nonsense"):
        monkeypatch.setenv("CASCADE_DEVICE", wanted)
        early.wake_gpu()
    assert driver.calls == []


def test_a_gpu_that_does_not_wake_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASCADE_DEVICE", raising=False)
    for failing, calls in (("cuInit", 1), ("cuDeviceGet", 2), ("cuDevicePrimaryCtxRetain", 3)):
        driver = Driver(failing)
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        early.wake_gpu()
        assert len(driver.calls) == calls
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    early.wake_gpu()


def test_threads_find_the_environment_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To change it while C code reads it may crash."""
    monkeypatch.setenv("CASCADE_WEIGHTS", str(tmp_path))
    monkeypatch.delenv("CUDA_MODULE_LOADING", raising=False)
    started: list[str | None] = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(os.environ.get("CUDA_MODULE_LOADING")))
    early.begin()
    early.end()
    assert started
    assert set(started) == {"LAZY"}
    before = dict(os.environ)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    early.wake_gpu()
    assert dict(os.environ) == before


def test_no_garbage_is_looked_for_in_what_was_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(tmp_path))
    early.begin()
    assert not gc.isenabled()
    kept = [[] for _ in range(1000)]
    early.end()
    assert gc.isenabled()
    assert not any(one is kept for one in gc.get_objects())
    assert gc.get_freeze_count() > 1000
