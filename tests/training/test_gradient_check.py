"""Compiled gradients are compared with plain ones."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_trainer import OPTIONS, Line
from training import trainer
from training.errors import TrainingError
from training.task import Task
from training.trainer import fit

pytestmark = pytest.mark.slow


class Layer(nn.Linear):
    """Compiled, its loss is right, and its gradient is ``factor`` times as large."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.factor * y - (self.factor - 1) * y.detach() if torch.compiler.is_compiling() else y


class Compiled(Line):
    def __init__(self, factor: float) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.line, self.dropout, self.compiled_by = Layer(1, 1), nn.Dropout(0), "its_option"
        self.line.factor = factor
        self.line.compile(backend="aot_eager")


def train(task: Task, folder: Path, **options: Any) -> bool:
    return fit(task, replace(OPTIONS, **{"steps": 6, "decay": 0, **options}), folder / "line", folder / "model")


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "STEPS", (4,))


@pytest.mark.parametrize("factor", [30.0, 0.8, float("nan")])
def test_wrong_gradients_end_a_training(factor: float, tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as raised:
        train(Compiled(factor), tmp_path)
    differ = f"differ from those of the same network, not compiled, by {abs(factor - 1):.2g} of their norm"
    assert str(raised.value).startswith(f"line: at step 4, the compiled gradients {differ}; ")
    assert str(raised.value).endswith("its_option = false trains without compiling.")


def test_right_gradients_change_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = []
    for steps in ((), (4,)):
        task = Compiled(1.0)
        with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
            patch.setattr(trainer, "STEPS", steps)
            assert train(task, tmp_path / str(len(steps)))
        weights.append(torch.cat([one.detach().flatten() for one in task.parameters()]))
    assert torch.equal(*weights)
    assert [line for line in caplog.messages if "differ" in line] == [
        "line: step 4: compiled and plain gradients differ by 0 of their norm."
    ]


def test_buffers_are_what_they_were(tmp_path: Path) -> None:
    class Counting(Compiled):
        def __init__(self) -> None:
            super().__init__(1.0)
            self.register_buffer("forwards", torch.zeros(()))

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            self.forwards += 1
            return super().forward(x, y)

    task = Counting()
    assert train(task, tmp_path)
    assert task.forwards == 6


@pytest.mark.parametrize("task", [Compiled(30.0), Line()], ids=["dropout", "not compiled"])
def test_what_cannot_be_compared_is_not(task: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task.dropout.p = 0.3 if task.compiled_by else 0.0
    with caplog.at_level(logging.INFO):
        assert train(task, tmp_path)
    assert not any("differ" in line for line in caplog.messages)


def test_a_memory_too_small_for_plain_networks_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Large(Layer):
        """Needs a petabyte if it is not compiled."""

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                torch.empty(2**50)
            return super().forward(x)

    task = Compiled(1.0)
    task.line = Large(1, 1)
    task.line.compile(backend="aot_eager")
    assert train(task, tmp_path)
    assert "line: the memory is too small to compare the compiled gradients with plain ones." in caplog.messages


def test_a_checkpoint_is_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        train(Compiled(2.0), tmp_path)
    task = Compiled(1.0)
    assert train(task, tmp_path)


def test_differences_that_rounding_explains_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Near the best weights, the gradient is a small difference of large numbers."""
    task = Compiled(1.5)
    weights = {"line.weight": torch.tensor([[3.001]]), "line.bias": torch.tensor([-1.0])}
    task.load_state_dict(weights)
    with caplog.at_level(logging.INFO):
        assert train(task, tmp_path, learning_rate=1e-12, weight_decay=0.0)
    assert "line: step 4: compiled and plain gradients differ by 0.5 of their norm." in caplog.messages
    torch.testing.assert_close(dict(task.state_dict()), weights, rtol=0, atol=0)
