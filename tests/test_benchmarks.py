"""The benchmarks of parts, as far as a CPU runs them: on the miniature, with quick pictures."""

from pathlib import Path

import pytest
import torch

from cascade import Cascade
from scripts import benchmark_loras, benchmark_prompts
from scripts.stand_ins import shapes_of, write_lora
from scripts.timing import in_turn, percent_more
from tests.conftest import MINI

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
