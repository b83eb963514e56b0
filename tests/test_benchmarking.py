"""The benchmark's arithmetic, table and plot; what it times needs a GPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cascade.weights.agreement import check_stored_processors
from scripts import benchmark_cards, benchmarking, stand_ins
from scripts.benchmarking import CASES, floor, table

MACHINE = {"gpu": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "runs": 5, "matmul_rate": 800.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*stand_ins.PLACES, "image_encoder"])
def test_stand_ins_have_the_published_sizes(name: str) -> None:
    """Without memory. Sizes in millions of parameters are those of the published files."""
    network = stand_ins.make_network(name, "meta")
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    published = {"prior": 3600, "prior_lite": 1000, "decoder": 1560, "decoder_lite": 700, "text_encoder": 695}
    others = {"vqgan": 18.4, "effnet": 21, "controlnet_canny": 53, "image_encoder": 304}
    assert millions == pytest.approx({**published, **others}[name], rel=0.06)


def test_the_text_encoder_fits_the_tokenizer_that_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1}
    variants = [replace(one, config=one.config | narrow) for one in stand_ins.VARIANTS if one.name == "text_encoder"]
    monkeypatch.setattr(stand_ins, "VARIANTS", variants)
    stand_ins.write_stand_ins(tmp_path, "cpu", ["text_encoder"])
    check_stored_processors(tmp_path / "stable-cascade-prior", tmp_path)


def result(contender: str, case: str, per_image: float) -> dict:
    return {
        "contender": contender,
        "case": case,
        "per_image": per_image,
        "first": 2.0,
        "ready": 6.0,
        "allocated": 11.5,
        "reserved": 12.25,
    }


FOUND = {
    "machine": MACHINE,
    "results": [
        result("ours", "batch 4", 0.4),
        result("diffusers", "batch 1", 2.5),
        result("ours", "batch 1", 0.5),
        result("ours", "2048 pixels", 4.0),
        {"contender": "ours, stream", "case": "batch 1", "error": "out of memory"},
    ],
}


def test_the_floor_is_the_counted_work_at_the_measured_rate() -> None:
    """227 TFLOP an image: 163 in Stage C, 62 in Stage B, 2 in Stage A; guidance in Stage B adds 62."""
    one, four, guided, lite = (floor(case, 800.0) for case in CASES)
    assert one == pytest.approx(227 / 800, rel=0.01)
    assert four == one
    assert guided - one == pytest.approx(62 / 800, rel=0.01)
    assert lite < one / 3
    assert floor(benchmarking.case("fast", speed="fast"), 800.0) == pytest.approx(115 / 800, rel=0.01)
    assert floor(benchmarking.case("large", size=2048), 800.0) is None
    assert floor(benchmarking.case("from a picture", image="start"), 800.0) is None


def test_table() -> None:
    lines = table(FOUND).splitlines()
    assert lines[0].startswith("NVIDIA H200, torch 2.11.0, CUDA 13.0, bfloat16, medians of 5 runs")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[:3] for row in rows] == [
        ["batch 1", "diffusers", "2.500"],
        ["batch 1", "ours", "0.500"],
        ["batch 1", "ours, stream", "out of memory"],
        ["batch 4", "ours", "0.400"],
        ["2048 pixels", "ours", "4.000"],
    ]
    assert rows[1][3:] == ["2.00", "11.5 (12.2)", "1.76", "2.0", "6.0"]
    assert rows[4][5] == ""


@pytest.mark.slow
def test_results_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps(FOUND))
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark", "--results", str(results), "--output", str(tmp_path)])
    benchmarking.main()
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip() == table(FOUND)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 500
        assert len(set(image.convert("RGB").resize((60, 30)).getdata())) > 10


def test_every_case_is_run_by_its_name() -> None:
    cases = [case["name"] for case in benchmarking.ALL]
    assert len(set(cases)) == len(cases)
    assert {case["name"] for of_one in benchmarking.BY_CONTENDER.values() for case in of_one} <= set(cases)


def test_the_table_of_cards() -> None:
    fits = {"mode": "resident", "seconds": {"1024": 0.561, "2048": 2.4}, "peak": {"1024": 12.18, "2048": 13.0}}
    small = {"mode": "stream", "seconds": {"1024": 2.0, "2048": None}, "peak": {"1024": 4.04, "2048": None}}
    *_, large_card, small_card = benchmark_cards.table({24: fits, 6: small}, "An H100").splitlines()
    assert large_card == "| 24 GiB | resident | 0.56 | 12.2 | 2.40 | 13.0 |"
    assert small_card == "| 6 GiB | stream | 2.00 | 4.0 | does not fit |  |"
