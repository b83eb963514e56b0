"""Files that the GPU makes, made again from what they say."""

import inspect
from pathlib import Path

import pytest
import torch

from predict import Predictor
from tests.conftest import MINI
from tests.metadata import read_record

DEFAULTS = {
    name: parameter.default.default
    for name, parameter in inspect.signature(Predictor.run).parameters.items()
    if name != "self"
}


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_what_a_file_says_makes_it_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte: the third time, and with other sizes between, graphs are replayed where they were recorded before."""
    monkeypatch.setenv("CASCADE_WEIGHTS", str(MINI))
    monkeypatch.setenv("CASCADE_MEMORY", memory)
    predictor = Predictor()
    predictor.setup()
    (file,) = predictor.run(**{**DEFAULTS, "prompt": "a red apple", "negative_prompt": "a leaf"})
    record, made = read_record(file), Path(file).read_bytes()
    assert record["device"] == {
        "type": "cuda",
        "name": torch.cuda.get_device_name(),
        "dtype": str(predictor.service.cascade.prior.dtype).removeprefix("torch."),
        "memory": memory,
    }
    for _ in range(2):
        predictor.run(**{**DEFAULTS, "width": 320})
        (again,) = predictor.run(**{**DEFAULTS, **record["inputs"]})
        assert Path(again).read_bytes() == made
