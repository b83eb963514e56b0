"""The shared loop: exact resumption, gradient accumulation, schedule."""

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DynamoBackend
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from training import divergence
from training.errors import TrainingError
from training.options import Options, learning_rate_factor
from training.randomness import step_generator
from training.record import Record
from training.task import Task
from training.trainer import fit
from training.weights.trained import make_accelerator

OPTIONS = Options(
    steps=8, batch_size=16, learning_rate=1e-2, warmup=2, decay=3, precision="no", compile=False, evaluate_every=5
)


class Line(Task):
    """Learns y = 3 x - 1, with dropout so that the global random state matters too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)
        self.dropout = nn.Dropout(0.3)
        self.seen: list[Tensor] = []

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.rand(size, 1, generator=generator)
        self.seen.append(x)
        return {"x": x, "y": 3 * x - 1}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.dropout(self.line(x)) - y).square().mean()}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        return {"weight": self.line.weight.item()}, Image.new("RGB", (4, 4))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.line.state_dict()), folder / "line.safetensors")


def test_resuming_gives_the_same_weights_as_never_stopping(tmp_path: Path) -> None:
    whole, halves = Line(), Line()
    assert fit(whole, OPTIONS, tmp_path / "whole", tmp_path / "model")
    # The schedule belongs to the whole run, so the interruption comes from outside, as a deadline would.
    stopper = Line()
    original = stopper.batch

    def interrupted(index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        if index == 3:
            raise KeyboardInterrupt
        return original(index, size, generator)

    stopper.batch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(stopper, replace(OPTIONS, checkpoint_seconds=0.0), tmp_path / "halves", tmp_path / "model_halves")
    assert fit(halves, OPTIONS, tmp_path / "halves", tmp_path / "model_halves")
    assert len(halves.seen) == OPTIONS.steps - 3
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value, rtol=0, atol=0)
    first, second = (load_file(tmp_path / name / "line.safetensors") for name in ("model", "model_halves"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def test_a_deadline_saves_and_says_that_work_is_left(tmp_path: Path) -> None:
    task = Line()
    assert not fit(task, OPTIONS, tmp_path / "run", tmp_path / "model", deadline=0.0)
    assert (tmp_path / "run" / "state").is_dir()
    assert (tmp_path / "model" / "line.safetensors").is_file()
    assert not task.seen


@pytest.mark.slow
def test_training_learns_and_writes_samples(tmp_path: Path) -> None:
    task = Line()
    task.dropout.p = 0.0
    options = replace(OPTIONS, steps=400, learning_rate=5e-2, decay=100, evaluate_every=200, ema=0.9)
    assert fit(task, options, tmp_path / "run", tmp_path / "model")
    assert task.line.weight.item() == pytest.approx(3, abs=0.2)
    saved = load_file(tmp_path / "model" / "line.safetensors")
    assert saved["bias"].item() == pytest.approx(-1, abs=0.2)
    assert (tmp_path / "run" / "samples" / "000200.png").is_file()


class Waves(nn.Linear):
    """Compiled, it keeps other tensors for the backward pass than otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cos().exp().sin()


class Recomputing(Line):
    """Has a layer of its own that is compiled, and runs it again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.line = Waves(1, 1)
        self.line.compile(backend="aot_eager_decomp_partition")

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        made = checkpoint(self.line, x, use_reentrant=False)
        return {"loss": (made - y).square().mean()}


@pytest.mark.slow
def test_parts_that_a_task_has_compiled_are_compiled_in_both_passes(tmp_path: Path) -> None:
    """Otherwise torch finds that what it computes again is not what it computed first."""
    task = Recomputing()
    before = task.line.weight.detach().clone()
    assert fit(task, OPTIONS, tmp_path / "run", tmp_path / "model")
    assert not torch.equal(task.line.weight, before)


class Normalised(Line):
    """Its outputs are normalised, so that what it saves depends on statistics of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0)
        self.line = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        x = torch.rand(size, 1, 4, 4, generator=generator)
        return {"x": x, "y": 3 * x - 1}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        assert not self.training
        return {}, Image.new("RGB", (4, 4))


@pytest.mark.slow
def test_statistics_are_those_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    options = replace(OPTIONS, steps=60, learning_rate=5e-2, decay=0, ema=0.99)
    fit(Normalised(), options, tmp_path / "run", tmp_path / "model")
    saved = load_file(tmp_path / "model" / "line.safetensors")
    convolved = torch.rand(10_000, generator=torch.Generator().manual_seed(0))[:, None] * saved["0.weight"].flatten()
    convolved += saved["0.bias"]
    torch.testing.assert_close(saved["1.running_mean"], convolved.mean(0), rtol=0.02, atol=0.02)
    torch.testing.assert_close(saved["1.running_var"], convolved.var(0), rtol=0.05, atol=1e-3)


def test_accumulation_sees_as_many_micro_batches(tmp_path: Path) -> None:
    task = Line()
    fit(task, replace(OPTIONS, steps=3, decay=0, accumulate=2), tmp_path / "run", tmp_path / "model")
    assert len(task.seen) == 6
    assert len({tuple(x.flatten().tolist()) for x in task.seen}) == 6


def test_accumulated_micro_batches_make_one_step_of_all(tmp_path: Path) -> None:
    """Two micro-batches of 8 and one batch of both give the same weights."""

    class Halves(Line):
        """Draws the micro-batches of 8 samples; a batch of 16 is two of them."""

        def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
            first = index * size // 8
            parts = [
                super(Halves, self).batch(0, 8, torch.Generator().manual_seed(first + i)) for i in range(size // 8)
            ]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    tasks = {}
    for accumulate in (1, 2):
        tasks[accumulate] = Halves()
        tasks[accumulate].dropout.p = 0.0
        options = replace(OPTIONS, batch_size=16 // accumulate, accumulate=accumulate)
        fit(tasks[accumulate], options, tmp_path / f"run{accumulate}", tmp_path / f"model{accumulate}")
    for one, other in zip(tasks[1].parameters(), tasks[2].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Product(torch.autograd.Function):
    """``weight * x``, whose gradient of the weight is written to the same memory at every call, as CUDA graphs do."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, memory: Tensor) -> Tensor:
        ctx.save_for_backward(x, memory)
        return weight * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, memory = ctx.saved_tensors
        return memory.copy_((gradient * x).sum().view(1, 1)), None, None


class Graphed(Line):
    """Its gradient is in the memory ``kept``, or in new memory every time."""

    def __init__(self, kept: Tensor | None = None) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        made = Product.apply(self.line.weight, x, torch.empty(1, 1) if self.kept is None else self.kept)
        return {"loss": (made + self.line.bias - y).square().mean()}


def test_gradients_are_accumulated_though_the_next_overwrites_their_memory(tmp_path: Path) -> None:
    """torch announces the outputs of a CUDA graph to autograd, which makes them a parameter's gradient without copying."""
    memory = torch.zeros(1, 1)
    torch._C._set_cached_tensors_enabled(True)
    torch._C._add_cached_tensor(memory)
    try:
        weights = []
        for name, task in {"new": Graphed(), "kept": Graphed(memory)}.items():
            fit(task, replace(OPTIONS, accumulate=3), tmp_path / name, tmp_path / "model")
            weights.append(task.line.weight.item())
    finally:
        torch._C._remove_cached_tensor(memory)
        torch._C._set_cached_tensors_enabled(False)
    assert weights[0] == weights[1]


def test_a_training_goes_on_with_another_number_of_micro_batches(tmp_path: Path) -> None:
    options = replace(OPTIONS, decay=0, ema=0.0)
    assert fit(Line(), replace(options, steps=3, accumulate=3), tmp_path / "run", tmp_path / "model")
    before = load_file(tmp_path / "run" / "state" / "model.safetensors")
    task = Line()
    assert fit(task, replace(options, steps=4, accumulate=2), tmp_path / "run", tmp_path / "model")
    assert len(task.seen) == 2
    assert not torch.equal(task.line.weight, before["line.weight"])


def test_a_training_goes_on_with_its_new_options(tmp_path: Path) -> None:
    """And not with those of the checkpoint."""
    folders = (tmp_path / "run", tmp_path / "model")
    assert not fit(Line(), OPTIONS, *folders, deadline=0.0)
    changed = replace(OPTIONS, learning_rate=1e-3, beta2=0.9, weight_decay=0.5, ema=0.0)
    kept = Line()
    assert fit(kept, changed, *folders)
    fresh = Line()
    assert fit(fresh, changed, tmp_path / "fresh", tmp_path / "fresh_model")
    assert torch.equal(kept.line.weight, fresh.line.weight)
    first, second = (load_file(tmp_path / name / "line.safetensors") for name in ("model", "fresh_model"))
    assert torch.equal(first["weight"], second["weight"])


def test_another_number_of_processes_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = (tmp_path / "run", tmp_path / "model")
    fit(Line(), OPTIONS, *folders, deadline=0.0)
    with caplog.at_level(logging.WARNING, logger="training"):
        fit(Line(), OPTIONS, *folders, deadline=0.0)
        assert not caplog.messages
        state = tmp_path / "run" / "state"
        shutil.copy(state / "random_states_0.pkl", state / "random_states_1.pkl")
        fit(Line(), OPTIONS, *folders, deadline=0.0)
    assert caplog.messages == [
        "The checkpoint is of 2 processes, and 1 continue it: they see other batches than it would have seen."
    ]


def test_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    options = replace(OPTIONS, steps=100, warmup=10, decay=20)
    factors = [learning_rate_factor(step, options) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert 0 < factors[99] < 0.01


def test_generators_differ_by_step_rank_and_seed() -> None:
    draws = {
        torch.rand(1, generator=step_generator(seed, step, rank, torch.device("cpu"))).item()
        for seed in range(3)
        for step in range(3)
        for rank in range(3)
    }
    assert len(draws) == 27


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A training that diverges ends; the checkpoint and the components that it wrote before stay."""
    assert fit(Line(), replace(OPTIONS, steps=3, decay=0), tmp_path / "line", tmp_path / "model")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert before
    task = Line()
    task.forward = lambda x, y: {"loss": task.line(x).sum() * torch.inf}  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"line: the weights are infinite or NaN at step 5; the last checkpoint"):
        fit(task, OPTIONS, tmp_path / "line", tmp_path / "model")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == before


def test_steps_and_times_are_recorded(tmp_path: Path) -> None:
    """A training in three parts, of which the first is ended by its deadline and the second by an error."""
    folder = tmp_path / "line"
    began = time.time()
    assert not fit(Line(), OPTIONS, folder, tmp_path / "model", deadline=0.0, began=began - 100)
    broken = Line()
    broken.forward = lambda x, y: {"loss": broken.line(x).sum() * torch.inf}  # type: ignore[method-assign]
    with pytest.raises(TrainingError):
        fit(broken, OPTIONS, folder, tmp_path / "model")
    assert fit(Line(), OPTIONS, folder, tmp_path / "model")
    record = Record.load(folder)
    assert record.stage == "line"
    assert record.options["steps"] == OPTIONS.steps == record.steps
    assert [(session.first, session.last) for session in record.sessions] == [(0, 0), (0, 8)]
    assert [session.device for session in record.sessions] == ["cpu", "cpu"]
    assert all(session.started.startswith(("20", "21")) for session in record.sessions)
    first, second = (session.seconds for session in record.sessions)
    assert 100 <= first["prepare"] < 160
    assert set(second) == {"prepare", "compile", "train", "evaluate", "save"}
    assert sum(record.seconds.values()) == pytest.approx(100 + time.time() - began, abs=5)


@pytest.mark.slow
def test_a_step_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, for want of a C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    try:
        # Not by monkeypatch, which leaves the option unreadable.
        with inductor_config.patch("cpp.cxx", (None, "no-such-compiler")), pytest.raises(TrainingError) as raised:
            fit(Line(), replace(OPTIONS, compile=True), tmp_path / "line", tmp_path / "model")
    finally:
        torch._dynamo.reset()
    assert str(raised.value).startswith("line: the first step, compiled, failed (")
    assert "no-such-compiler" in str(raised.value)
    assert str(raised.value).endswith("); compile = false trains without compiling.")


def test_a_step_for_which_the_memory_is_too_small(tmp_path: Path) -> None:
    task = Line()
    task.forward = lambda x, y: {"loss": task.line(x).new_empty(2**50).mean()}  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as raised:
        fit(task, OPTIONS, tmp_path / "line", tmp_path / "model")
    assert str(raised.value) == (
        "line: the memory is too small for a micro-batch of 16; a smaller batch_size needs less, and a larger accumulate makes "
        "up for it."
    )


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(TrainingError, match=r"record\.json is damaged \(.*; remove it to go on without its times\.$"):
        fit(Line(), OPTIONS, tmp_path, tmp_path / "model")


def test_a_task_that_cannot_be_sharded(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="sharded is true; only scripts/train-stage-c trains sharded networks"):
        fit(Line(), replace(OPTIONS, sharded=True), tmp_path / "run", tmp_path / "model")


def test_sharded_trainings_do_not_compute_in_float16() -> None:
    with pytest.raises(TrainingError, match="precision is 'fp16'; sharded trainings compute in 'bf16' or 'no'"):
        replace(OPTIONS, sharded=True, precision="fp16")


def test_each_training_has_its_own_precision_and_compiler(tmp_path: Path) -> None:
    """Also where several follow one another in a process."""
    for precision, compiled in (("bf16", True), ("no", False), ("bf16", False)):
        accelerator = make_accelerator(OPTIONS, tmp_path, precision=precision, compiled=compiled)
        assert accelerator.mixed_precision == precision
        assert (accelerator.state.dynamo_plugin.backend == DynamoBackend.INDUCTOR) == compiled


class Guess(Task):
    """Predicts noise by the noise itself, or, if it is stuck, by a number."""

    def __init__(self, stuck: bool) -> None:
        super().__init__()
        self.stuck, self.factor = stuck, nn.Parameter(torch.zeros(()))

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.randn(size, 16, generator=generator)}

    def forward(self, noise: Tensor) -> dict[str, Tensor]:
        error = (self.factor * (torch.ones_like(noise) if self.stuck else noise) - noise).square().mean()
        return {"loss": error, "epsilon": error.detach()}

    def evaluate(self) -> tuple[dict[str, float], None]:
        return {}, None

    def save(self, folder: Path) -> None:
        pass


@pytest.mark.parametrize("stuck", [False, True])
def test_a_network_that_learns_nothing_is_told(stuck: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "FIRST", 40)
    options = replace(OPTIONS, steps=60, decay=0, evaluate_every=5000)
    if not stuck:
        assert fit(Guess(stuck), options, tmp_path / "guess", tmp_path / "model")
        return
    with pytest.raises(
        TrainingError, match=r"guess: at step 40, the error is (0\.9|1\.0).* of that of predicting nothing"
    ):
        fit(Guess(stuck), options, tmp_path / "guess", tmp_path / "model")
