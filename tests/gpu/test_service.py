"""Cog's real server on the GPU: requests of all kinds, sizes, numbers and orders, in every memory mode."""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from cascade.weights.build import save_model
from cascade.weights.published import PARTS
from scripts.stand_ins import shapes_of, write_lora
from tests.http.drawn import KINDS, Drawn, Model, bad_inputs, check, draw
from tests.http.serving import Server, wait_for
from tests.hub.repositories import write_download

SEED = 20_261_126
MINI = Model(controls=("canny", "inpainting", "super_resolution"), largest=512, loras=("style", "sks"))
FULL = Model(native_size=1024, controls=MINI.controls, smallest=512, largest=1280, steps=2, loras=("style",))
PLAIN = Drawn("text", {"prompt": "a red apple", "seed": 1, "output_format": "png"}, 1, None, "PNG")
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "huggingface_hub",
    "accelerate",
    "diffusers",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
)
# Seconds to compile all kernels and to read 20 GB, on a slow disk.
SETUP = 180
NOISE = 1.0  # of 255, in the mean: two runs of one request differ in the last bits of bfloat16


@pytest.fixture(scope="module", autouse=True)
def versions(pytestconfig: pytest.Config) -> None:
    """Prints all that the tests ran with."""
    found = {"Python": platform.python_version(), "CUDA": torch.version.cuda, "GPU": torch.cuda.get_device_name()}
    found |= {name: metadata.version(name) for name in (*PACKAGES, "cog", "coglet")}
    report(pytestconfig, "Ran with " + ", ".join(f"{name} {version}" for name, version in found.items()))


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins of the published networks, all parts that there can be, as a model folder."""
    folder = tmp_path_factory.mktemp("full")
    write_download(folder / "download", [name for name in PARTS if "lite" not in name], device="cuda")
    torch.cuda.empty_cache()
    save_model(folder / "download", folder / "model")
    (folder / "model" / "loras").mkdir()
    write_lora(folder / "model" / "loras" / "style.safetensors", shapes_of(folder / "model"), 16, size=0.002)
    return folder / "model"


def report(config: pytest.Config, line: str) -> None:
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line}", flush=True)


@contextmanager
def serving(folder: Path, weights: Path, memory: str) -> Iterator[Server]:
    """A server that is ready, on the GPU in bfloat16."""
    server = Server(folder, weights=weights, CASCADE_MEMORY=memory)
    try:
        wait_for(lambda: server.status() in ("READY", "SETUP_FAILED"), SETUP, "setup")
        log = server.log.read_text()
        assert server.status() == "READY", log
        assert "onto cuda" in log
        yield server
    finally:
        server.stop()


def check_same(made: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, two in zip(made, expected, strict=True):
        assert np.abs(one.astype(int) - two).mean() <= NOISE


def ask(server: Server, drawn: Drawn, model: Model) -> list[np.ndarray]:
    server.wait_until("READY")
    answer = server.post(drawn.inputs)
    assert answer.status_code == 200, answer.text
    return check(drawn, answer.json(), model)


@pytest.mark.parametrize(("memory", "count"), [("resident", 200), ("offload", 60), ("stream", 60)])
def test_drawn_requests_succeed(
    tmp_path: Path, mini_with_controlnets: Path, pytestconfig: pytest.Config, memory: str, count: int
) -> None:
    """With bad and cancelled ones in between. Every twentieth is made again, and so is the same one without LoRAs."""
    random = Random(f"{SEED} {memory}")
    kinds: Counter[str] = Counter()
    start = time.monotonic()
    with serving(tmp_path, mini_with_controlnets, memory) as server:
        plain = ask(server, PLAIN, MINI)
        for i in range(count):
            drawn = draw(random, MINI, KINDS[i] if i < len(KINDS) else None)
            made = ask(server, drawn, MINI)
            kinds[drawn.kind] += 1
            if i % 20 == 10:
                check_same(ask(server, drawn, MINI), made)
                check_same(ask(server, PLAIN, MINI), plain)
            if i % 10 == 5:
                server.wait_until("READY")
                failed = server.post(bad_inputs(random)).json()
                assert failed["status"] == "failed"
                assert failed["error"].endswith(".")
            if i % 25 == 7:
                with server.busy(f"cancelled-{i}"):
                    pass
        server.wait_until("READY")
        log = server.log.read_text()
    assert "Traceback" not in log
    seconds = time.monotonic() - start
    report(pytestconfig, f"{memory}: {count} of {count} succeeded in {seconds:.0f} s: {dict(kinds)}")


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_all_kinds_at_full_size(tmp_path: Path, full_size: Path, pytestconfig: pytest.Config, memory: str) -> None:
    """Twice each: the second time, graphs of all networks are replayed."""
    random = Random(f"{SEED} full {memory}")
    spent = []
    with serving(tmp_path, full_size, memory) as server:
        for kind in KINDS:
            drawn = draw(random, FULL, kind)
            start = time.monotonic()
            first = ask(server, drawn, FULL)
            check_same(ask(server, drawn, FULL), first)
            spent.append(f"{kind} {time.monotonic() - start:.1f}")
        assert "Traceback" not in server.log.read_text()
    report(pytestconfig, f"{memory}, full size, seconds for two: {', '.join(spent)}")
