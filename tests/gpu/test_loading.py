"""What it costs to compare checksums while a network of 7 GB goes from the page cache onto the GPU."""

import time
from pathlib import Path

import pytest
import torch

from cascade.weights import PUBLISHED_SAMPLER, ModelFolder, WeightsError, write_model_json
from tests.hub.repositories import write_download

RUNS = 7
MOST = 1.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of nothing but Stage C, of the published size."""
    root = tmp_path_factory.mktemp("loading")
    write_download(root, ["prior"], device="cuda")
    torch.cuda.empty_cache()
    folder = root / "stable-cascade-prior"
    write_model_json(folder, name="Stage C", license="", native_size=1024, sampler=PUBLISHED_SAMPLER)
    return folder


def seconds(folder: Path, check: bool) -> float:
    opened = ModelFolder.open(folder, check=check)
    torch.cuda.synchronize()
    start = time.perf_counter()
    network = opened.load_component("prior", device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del network
    return taken


def test_checks_take_a_tenth_more_at_most(folder: Path, pytestconfig: pytest.Config) -> None:
    taken: dict[bool, list[float]] = {True: [], False: []}
    for run in range(RUNS + 1):
        for check in (False, True):
            spent = seconds(folder, check)
            if run:  # the first fills the page cache, and torch's of GPU memory
                taken[check].append(spent)
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for check, each in taken.items():
            print(
                f"\n{'checked' if check else 'not checked'}: {', '.join(f'{one:.3f}' for one in sorted(each))} s",
                end="",
            )
    assert min(taken[True]) <= MOST * min(taken[False])


def test_damage_on_the_way_to_the_gpu(folder: Path) -> None:
    (file,) = (folder / "prior").glob("*.safetensors")
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        before = stream.read(1)
        stream.seek(size // 2)
        stream.write(bytes([before[0] ^ 1]))
    with pytest.raises(WeightsError, match=rf"{file} is damaged at "):
        ModelFolder.open(folder).load_component("prior", device="cuda", dtype=torch.bfloat16)
