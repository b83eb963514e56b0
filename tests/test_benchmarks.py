"""The benchmarks of parts, as far as a CPU runs them: on the miniature, with quick pictures."""

import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from cascade import Cascade
from miniature.icons import STYLES, load_drawings
from miniature.prompts import make_prompts
from scripts import (
    benchmark_eight_bits,
    benchmark_fp8,
    benchmark_loras,
    benchmark_prompts,
    benchmark_start,
    benchmark_training,
)
from scripts.benchmarking import WORK
from scripts.environment import ROOT
from scripts.stand_ins import shapes_of, write_lora
from scripts.timing import in_turn, percent_more
from tests.conftest import MINI
from tests.miniature.small import pack
from tests.training.nursery import Nursery
from tests.training.test_encoded import RECIPE
from training.encoded.recipe import read_recipe

QUICK = {"width": 64, "height": 64, "steps_prior": 1, "steps_decoder": 1}


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade.load(MINI, "cpu", torch.float32)


def test_runs_alternate_and_warm_ups_do_not_count() -> None:
    order: list[str] = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert [len(each) for each in seconds.values()] == [2, 2]
    assert percent_more([1.0, 2.0, 3.3], [1.0, 1.0, 3.0]) == pytest.approx([0, 10, 100])


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="only Linux says what processes have taken")
def test_processor_seconds_are_those_of_a_process_and_of_those_below_it() -> None:
    work = "while time.process_time() < 0.3: pass"
    program = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", "import time\\n{work}"], check=True)  # has ended
child = subprocess.Popen([sys.executable, "-c", "import sys, time\\n{work}\\nprint(flush=True)\\nsys.stdin.read()"],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        taken = benchmark_start.processor_seconds(process.pid)
        process.stdin.close()
    assert 0.55 < taken < 5


@pytest.mark.parametrize("models", [("floor", "mini"), ("mini",)])
def test_starts_are_one_table_and_answers_another(models: tuple[str, ...]) -> None:
    one = {"kernels": "", "ready_s": 3.0, "processor_s": 2.0}
    starts = [{"model": "floor", **one}] if "floor" in models else []
    starts += [{"model": "mini", **one, "ready_s": ready, "first_s": 0.5, "later_s": 0.4} for ready in (4.0, 5.0, 9.0)]
    answer = {
        "model": "mini",
        "pictures": 1,
        "format": "png",
        "side": 256,
        "answer_s": 1,
        "engine_s": 0.9,
        "over_s": 0.1,
    }
    text = benchmark_start.tables({"starts": starts, "answers": [{**answer, "kilobytes": 12}]})
    first, second = text.split("\n\n")
    over = "2.00" if "floor" in models else ""
    assert first.splitlines()[-1] == f"| mini |  | 3 | 5.00 | {over} | 2.00 | 0.500 | 0.400 |"
    assert second.splitlines()[-1] == "| mini | 1 | png | 256 | 1 | 0.9 | 0.1 | 12 |"
    for table in (first, second):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.slow
def test_loras(cascade: Cascade, tmp_path: Path) -> None:
    paths = [write_lora(tmp_path / f"{seed}.safetensors", shapes_of(MINI), 4, seed) for seed in range(2)]
    found = benchmark_loras.measure(cascade, paths, 2, QUICK, QUICK)
    assert {len(found[name]) for name in ("picture", "picture with", *benchmark_loras.CHANGES)} == {2}
    assert min(found["picture"] + found["picture with"]) > 0
    text = benchmark_loras.table({"resident": {**found, "gpu": 2**29, "host": -(2**28)}}, "CPU")
    assert text.startswith("CPU\n\n| memory mode |")
    assert text.endswith("| +0.50 | -0.25 |")
    assert len({line.count("|") for line in text.splitlines()[2:]}) == 1


@pytest.mark.slow
def test_prompts(cascade: Cascade) -> None:
    found = benchmark_prompts.measure(cascade, 1, **QUICK)
    assert [one["chunks"] for one in found] == [1, 2, 3, 4]
    assert found[0]["percent more"] == [0, 0, 0]
    assert min(one["seconds"] for one in found) > 0


def test_e4m3_is_as_exact_as_it_can_be() -> None:
    """Relative errors of normal operands: 2.6 % each, so 3.7 % of a product."""
    torch.manual_seed(0)
    layer, x = nn.Linear(2048, 64), torch.randn(3, 5, 2048)
    with torch.no_grad():
        nn.init.normal_(layer.weight, std=0.02)
        layer.bias.zero_()
        exact = layer(x)
        for make in benchmark_eight_bits.PRODUCTS.values():
            made = make(layer)(x)
            assert made.shape == exact.shape
            assert 0.03 < benchmark_eight_bits.difference(made, exact) < 0.045
        stored = {name: make(layer)(x) for name, make in benchmark_eight_bits.STORAGE.items()}
        errors = {name: benchmark_eight_bits.difference(made, exact) for name, made in stored.items()}
    assert 0.02 < errors["e4m3 weights per row"] < 0.03
    assert errors["int8 weights in groups"] < 0.8 * errors["int8 weights per row"] < 0.01


@pytest.mark.slow
def test_eight_bits(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few times and shares, because each is a prediction, or pictures, more, and with tiny networks."""
    monkeypatch.setattr(benchmark_eight_bits, "TIMES", (0.5,))
    monkeypatch.setattr(benchmark_eight_bits, "SHARES", (0.5, 1.0))
    cascade = Cascade.load(model_folder, "cpu", torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in cascade.prior.state_dict().items()}
    found = benchmark_eight_bits.miniature(cascade, ["a red apple"])
    for one in found:
        assert sorted(one.ranked) == sorted(one.shapes)
        assert one.least_sensitive(1.0) == one.ranked
        half = one.least_sensitive(0.5)
        assert half == one.ranked[: len(half)]
        bfloat16 = one.error({})
        rounded = one.error(one.made(benchmark_eight_bits.PRODUCTS["e4m3 per row"]))
        assert 0 < bfloat16 < one.error(one.made(benchmark_eight_bits.PRODUCTS["e4m3 per row"], half)) < rounded < 0.2
        assert one.error({}) == bfloat16
        text = benchmark_eight_bits.errors("the miniature", one)
        assert text.count("| 100% |") == 1
        assert f"| bfloat16 | {100 * bfloat16:.3f} | 1.0 |" in text
        assert bfloat16 < one.error(one.in_fp8()) < rounded
    drawings = load_drawings(pack(["apple", "dog", "cat", "house", "boat", "sun"], tmp_path / "drawings.zip"))
    prompts = make_prompts(drawings[1], STYLES, 0, 2, 1)
    drawn = benchmark_eight_bits.draw_all(cascade, found, prompts, drawings, {"steps_prior": 1, "steps_decoder": 1})
    table = benchmark_eight_bits.picture_table(drawn).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(drawn)
    assert "| bfloat16 | 0.00 |" in table[2]
    assert "object first" in table[0]
    for name, tensor in cascade.prior.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_operations_in_fp8() -> None:
    """All run. Products of the same inputs are nearly those in bfloat16, in either form."""
    level = benchmark_fp8.Level("small", 32, 2, 3, 5, 7)
    with torch.no_grad():
        made = benchmark_fp8.Layer(level, 2, torch.device("cpu"), "plain", copies=2).operations()
    found = {}
    for one in made:
        for call in one[1:]:
            result = call(1) if call is not None else None
            tensors = [
                part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, torch.Tensor)
            ]
            assert all(tensor.float().isfinite().all() for tensor in tensors), one.name
        found[one.name] = [1e-6, 2e-6, None if one.other is None else 3e-6]
    table = benchmark_fp8.table("small", level.layers, found).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[-1] == "| 7 layers, ms | 0.1 | 0.1 | |"
    for name in ("MLP, first layer", "q, k, v"):
        (one,) = (one for one in made if one.name == name)
        exact = one.bfloat16(0).float()
        for product in (one.fp8(0), one.other(0)):
            assert product.shape == exact.shape
            assert 0 < (product - exact).norm() / exact.norm() < 0.06


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """Arguments of the benchmark of training, for a small network."""
    config = tmp_path / "recipe.toml"
    config.write_text(RECIPE.replace("[options]", "[options]\nsharded = true"))
    files = ["--config", str(config), "--folder", str(tmp_path / "scratch"), "--output", str(tmp_path / "found.json")]
    return [*files, "--side", "128", "--accumulate", "2"]


@pytest.mark.slow
def test_training_speed_is_kept_though_it_is_stopped(tmp_path: Path, training: list[str], nursery: Nursery) -> None:
    """By two processes; SIGTERM comes after a few of the timed steps."""
    launch = [nursery.python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with subprocess.Popen(
        [*launch, "-m", "scripts.benchmark_training", "speed", *training, "--steps", "1000000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        lines = [json.loads(process.stdout.readline()) for _ in range(8)]
        process.send_signal(signal.SIGTERM)
        lines += map(json.loads, process.stdout)
    assert process.returncode != 0
    parts = [one["part"] for one in lines]
    assert parts[:3] == ["gpu", "gpu", "made"]
    assert set(parts[3:]) == {"step"}
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["name"] for one in found["gpus"]] == ["cpu", "cpu"]
    timed = [one["seconds"] for one in lines if one.get("kind") == "seconds"]
    assert found["seconds"][: len(timed)] == timed
    assert len(timed) >= 2
    assert found["samples_a_step"] == 8
    assert found["samples_a_second"] == pytest.approx(8 / statistics.median(found["seconds"]))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.slow
def test_resumed_training(
    tmp_path: Path, training: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a group of one process."""
    monkeypatch.setattr(benchmark_training, "be_deterministic", lambda: None)  # it changes settings of this process
    (tmp_path / "scratch" / "benchmark-training" / "training" / "state").mkdir(
        parents=True
    )  # left by a run that was killed
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    assert benchmark_training.main(["resume", *training, "--further", "1"]) == 0
    assert not dist.is_initialized()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [(one["part"], one["step"]) for one in lines if "step" in one]
    assert steps == [("step", 1), ("step", 2), ("saved", 2), ("step", 3), ("loaded", 2), ("step", 3)]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["uninterrupted"] == found["resumed"]
    assert found["equal"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_disk_without_room_for_a_checkpoint(tmp_path: Path) -> None:
    state = PartialState(cpu=True)
    with (
        pytest.raises(SystemExit, match=r"GB free, and a checkpoint takes 1000000000 GB; name another --folder\.$"),
        benchmark_training.scratch(tmp_path, state, 1e9),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_work_of_a_training_step_is_that_of_pictures() -> None:
    published = read_recipe(ROOT / "training" / "published.toml")
    assert benchmark_training.forward_work(published, 1024) == pytest.approx(WORK[False][0], abs=5e-3)
