"""What a start does before it is asked for anything, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from predict import Predictor
from tests.conftest import MINI
from tests.readme import ROOT

# Says whether GPU 0 has a primary context, before torch is imported, and what torch computes there afterwards.
PROGRAM = """
import ctypes, sys
from serving import early

early.wake_gpu()
assert "torch" not in sys.modules
flags, active = ctypes.c_uint(), ctypes.c_int()
assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active)) == 0
import torch

print(active.value, torch.ones(3, device="cuda").sum().item())
"""


def test_the_gpu_is_woken_before_torch_is_imported() -> None:
    variables = {**os.environ, "CASCADE_DEVICE": "auto"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "3.0"], done.stderr


def test_graphs_of_the_native_size_are_captured_before_the_first_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(MINI))
    predictor = Predictor()
    predictor.setup()
    service = predictor.service
    service.model_thread.submit(lambda: None).result()
    captured = len(service.cascade.runner.graphs)
    assert captured > 2
    given = {"prompt": "a red apple", "seed": 1, "output_format": "png"}
    (file,) = service.predict(given, lambda *_: None)
    assert len(service.cascade.runner.graphs) == captured
    assert Path(file).stat().st_size > 1000
