"""Trainings by two processes, on CPUs: against one, sharded or not, resumed, accumulated, and by another number of them."""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CLIPTokenizer

from cascade.networks.unet import StableCascadeUNet
from tests.training import sharded_training, small
from tests.training.nursery import Nursery
from tests.training.sharded_training import OPTIONS, REPLICATED, SIZES, make_trainer, train, write_pictures
from training.errors import TrainingError
from training.tasks.tokenizer import SMALLEST_VOCABULARY

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Path:
    """What two processes have made, see `sharded_training.main`."""
    folder = tmp_path_factory.mktemp("sharded")
    write_pictures(folder / "pictures")
    small.write_pictures(folder / "own", 4)
    small.write_config(folder)
    runs = ["exact", "kept", "uninterrupted", "resumed", "halfway", "lower", "counted"]
    runs += ["replicated", "replicated-halfway", "tokenizer", "encoded"]
    subprocess.run(
        [
            *(nursery.python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(sharded_training.__file__, folder, *runs),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=1200,
    )
    return folder


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(folder: Path, run: str) -> dict[str, Tensor]:
    return torch.load(folder / f"{run}.pt")


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All weights and averages, but for the bias of keys: a softmax does not depend on it, so Adam scales up rounding errors."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        pair = [one.view(3, -1)[[0, 2]] if name.endswith("to_qkv.bias") else one for one in (found[name], value)]
        torch.testing.assert_close(*pair, rtol=0, atol=3e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process makes with the batches of both."""
    options = replace(OPTIONS, batch_size=4, sharded=False)
    return train(folder / "pictures", tmp_path_factory.mktemp("alone"), options, writes=False, dropout=0.0)


@pytest.mark.parametrize("form", ["exact", "replicated"])
def test_two_processes_train_as_one_with_their_batches(folder: Path, alone: dict[str, Tensor], form: str) -> None:
    """Weights and their averages, after clipped steps of two micro-batches."""
    assert_close(made(folder, form), alone)
    halfway = made(folder, "halfway")
    for name, value in alone.items():
        fixed = ".sca." in name or ".crp." in name
        assert ((halfway[name] - value).abs().max() > 1e-4) != fixed, name


def test_the_written_network_has_the_averages(folder: Path) -> None:
    written, exact = StableCascadeUNet.from_pretrained(folder / "exact" / "model" / "prior"), made(folder, "exact")
    for name, value in written.named_parameters():
        assert torch.equal(value, exact[f"averages.{name}"].bfloat16().to(value.dtype)), name


def test_a_resumed_training_equals_an_uninterrupted_one(folder: Path) -> None:
    """To the bit, with dropout and an adaptive loss weight, whose states differ between the processes."""
    uninterrupted, resumed = made(folder, "uninterrupted"), made(folder, "resumed")
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name


def test_kept_activations_give_what_recomputed_ones_give(folder: Path) -> None:
    kept = made(folder, "kept")
    for name, value in made(folder, "exact").items():
        assert torch.equal(kept[name], value), name


def test_gradients_are_reduced_once_a_step(folder: Path) -> None:
    """However many micro-batches it has; parameters are gathered once, too."""
    for process in range(2):
        one, three = json.loads((folder / f"counts-{process}.json").read_text())
        blocks = 2 * sum((*SIZES["down_num_layers_per_block"], *SIZES["up_num_layers_per_block"]))
        assert one["reduce_scatter_base"] == blocks + 1  # all other parameters are one more unit
        assert one["allgather_base"] == blocks + 1
        assert three == one


def test_processes_draw_different_numbers(folder: Path) -> None:
    """Otherwise dropout would have the same masks in all of them."""
    first, second = (json.loads((folder / f"draw-{process}.json").read_text()) for process in range(2))
    assert first != second


def test_sharded_networks_compute_in_bfloat16_like_others(folder: Path) -> None:
    found = made(folder, "lower")
    torch.testing.assert_close(found["made"], found["expected"], rtol=0, atol=0)


def test_another_number_of_processes_continues(
    folder: Path, tmp_path: Path, one_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same batches in all, it gives the same weights."""
    shutil.copytree(folder / "halfway" / "state", tmp_path / "state")
    with caplog.at_level(logging.WARNING, logger="training"):
        continued = train(folder / "pictures", tmp_path, replace(OPTIONS, batch_size=4), writes=False, dropout=0.0)
    assert_close(continued, made(folder, "exact"))
    assert "The checkpoint is of 2 processes, and 1 continue it" in caplog.text


def test_a_gpu_alone_continues_what_two_have_begun(
    folder: Path, tmp_path: Path, alone: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """The option ``gpus`` is above 1, so its batch is as large as theirs together."""
    shutil.copytree(folder / "replicated-halfway" / "state", tmp_path / "state")
    with caplog.at_level(logging.WARNING, logger="training"):
        assert_close(train(folder / "pictures", tmp_path, REPLICATED, writes=False, dropout=0.0), alone)
    assert "The checkpoint is of 2 processes, and 1 continue it" in caplog.text


def test_two_processes_encode_what_one_does(folder: Path) -> None:
    latents, rows = sharded_training.encoded(600)
    few, _ = sharded_training.encoded(3)
    for process in range(2):
        found = made(folder, f"encoded-{process}")
        for name, value in (("latents", latents), ("rows", rows), ("few", few)):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value), name


def test_two_processes_make_a_tokenizer(folder: Path) -> None:
    assert (folder / "tokenizer" / "tokenizer" / "finished").exists()
    assert len(CLIPTokenizer.from_pretrained(folder / "tokenizer" / "model" / "tokenizer")) > SMALLEST_VOCABULARY


def test_a_checkpoint_of_other_sizes(
    folder: Path, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").symlink_to(folder / "halfway" / "state")
    monkeypatch.setitem(SIZES, "down_num_layers_per_block", (2, 2))
    with pytest.raises(
        TrainingError, match=r"state does not fit this configuration, or is damaged \(.+\); move it away"
    ):
        make_trainer(folder / "pictures", tmp_path, OPTIONS, dropout=0.0)


def test_a_checkpoint_that_is_not_sharded(folder: Path, tmp_path: Path, one_process: None) -> None:
    train(folder / "pictures", tmp_path, replace(OPTIONS, sharded=False), until=1, dropout=0.0)
    with pytest.raises(TrainingError, match="state does not fit this configuration"):
        make_trainer(folder / "pictures", tmp_path, OPTIONS, dropout=0.0)


def test_one_process_alone_is_told_to_start_more(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"sharded is true, which needs several processes, and only one trains"):
        make_trainer(folder / "pictures", tmp_path, OPTIONS, dropout=0.0)
