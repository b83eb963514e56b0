"""Base weights are read again to the bit, in blocks; files that change meanwhile end in one sentence."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.weights import base, blocks
from cascade.weights.base import FileWeights
from cascade.weights.errors import WeightsError

CPU = torch.device("cpu")
TENSORS: dict[str, Tensor] = {
    "large": torch.randn(100, 30),
    "half": torch.randn(7, 11).half(),
    "brain": torch.randn(64, 3).bfloat16(),
    "one": torch.randn(1),
    "scalar": torch.randn(()),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    names = sorted(TENSORS)
    for path, some in zip(paths, (names[:3], names[3:]), strict=True):
        save_file({name: TENSORS[name] for name in some}, path)
    return paths


def current(name: str) -> Tensor:
    raise AssertionError(f"{name} is in the file")


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [1, 500, base.AHEAD])
@pytest.mark.parametrize("block", [1, 100, blocks.BLOCK])
def test_tensors_come_in_order_and_to_the_bit(
    block: int, ahead: int, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(base, "AHEAD", ahead)
    weights = FileWeights({"prior": files})
    for names in (list(TENSORS), list(reversed(TENSORS)), ["one"], []):
        read = [(name, tensor) for name, tensor in weights.read("prior", names, CPU, current)]
        assert [name for name, _ in read] == names
        for name, tensor in read:
            assert tensor.dtype == TENSORS[name].dtype
            assert torch.equal(tensor, TENSORS[name])


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("change", [shorten, rewrite, Path.touch])
def test_a_file_that_changed_before_is_refused(change: Callable[[Path], None], files: list[Path]) -> None:
    weights = FileWeights({"prior": files})
    change(files[1])
    with pytest.raises(
        WeightsError, match=r"second\.safetensors has changed since it was loaded; load the model again"
    ):
        next(weights.read("prior", ["large"], CPU, current))


def test_a_file_that_is_cut_while_it_is_read_is_refused(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "AHEAD", 1)
    read = FileWeights({"prior": files}).read(
        "prior", ["one", "none", "scalar", "brain", "half", "large"], CPU, current
    )
    next(read)
    for path in files:
        os.truncate(path, 100)
    with pytest.raises(WeightsError, match="is shorter than when it was loaded; load the model again"):
        list(read)


def test_reading_that_ends_early_leaves_no_file_open(files: list[Path]) -> None:
    read = FileWeights({"prior": files}).read("prior", list(TENSORS), CPU, current)
    next(read)

    def opened() -> set[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return {os.readlink(link) for link in links if os.path.lexists(link)}

    assert {str(path) for path in files} <= opened()
    read.close()
    assert not {str(path) for path in files} & opened()
