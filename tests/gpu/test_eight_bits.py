"""Weights in 8 bits on a GPU: the kernel, predictions with and without graphs, and memory modes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cascade import Cascade, Lora, Request
from cascade.kernels import load, plain
from cascade.networks.eight_bits import quantise
from cascade.networks.precisions import IN_8_BITS, network_precision
from cascade.running.graphs import GraphCache, GraphedUNet
from cascade.weights import ModelFolder
from scripts.stand_ins import shapes_of, write_lora
from tests.components import equal, in_eight_bits_of, restored_from
from tests.conftest import MINI
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

CUDA = torch.device("cuda")
REQUEST = Request("a red apple on a yellow background", width=256, height=256, seed=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(6144, 2048), (2048, 8192), (160, 240), (7, 97), (1, 1)])
def test_the_kernel_computes_what_torch_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    eight = quantise(torch.randn(shape, device=CUDA) * 0.02)
    made = load("triton").dequantise(*eight, dtype)
    assert torch.equal(made, plain.dequantise(*eight, dtype))
    rows = slice(shape[0] // 3, shape[0])
    part = load("triton").dequantise(eight.weight[rows], eight.scale[rows], dtype)
    assert torch.equal(part, made[rows])


def test_a_gpu_rounds_as_a_cpu() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(512, 2048)
    for one, other in zip(quantise(matrix.to(CUDA)), quantise(matrix), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(("name", "config", "channels"), [("prior", STAGE_C, 16), ("decoder", STAGE_B, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_are_those_of_the_matrices(name: str, config: dict, channels: int, dtype: torch.dtype) -> None:
    original = make(config).to(CUDA, dtype)
    eight = in_eight_bits_of(original, name)
    ordinary = restored_from(eight, original)
    given = {key: tensor.to(CUDA, dtype) for key, tensor in inputs(config).items()}
    sample, time = torch.randn(2, channels, 8, 8, device=CUDA), torch.full((2,), 0.3, device=CUDA)
    made = []
    for network in (eight, ordinary):
        network.use_kernels("triton")
        with torch.no_grad():
            made.append(network(sample, time, **given))
    if dtype == torch.bfloat16:
        assert torch.equal(*made)
    else:  # where float16 multiplies in float32, the matrices are not rounded
        assert (made[0] - made[1]).norm() < 5e-3 * made[1].norm()


@pytest.fixture(scope="module")
def resident() -> Cascade:
    return Cascade.load(MINI, CUDA, "bfloat16", memory="resident", precision="int8")


def difference(one: Cascade, other: Cascade, request: Request = REQUEST) -> float:
    """Mean, of 255."""
    pictures = [np.asarray(cascade.generate(request)[0], np.float32) for cascade in (one, other)]
    return float(np.abs(pictures[0] - pictures[1]).mean())


@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_memory_modes_make_the_same_pictures(memory: str, resident: Cascade) -> None:
    cascade = Cascade.load(MINI, CUDA, "bfloat16", memory=memory, precision="int8")
    assert network_precision(cascade.prior) == "int8"
    assert difference(cascade, resident) < 0.5


def test_graphs_change_nothing() -> None:
    eight = in_eight_bits_of(make(STAGE_C).to(CUDA, torch.bfloat16), "prior")
    eight.use_kernels("triton")
    given = {key: tensor.to(CUDA, torch.bfloat16) for key, tensor in inputs(STAGE_C).items()}
    time = torch.full((2,), 0.3, device=CUDA)
    graphed = GraphedUNet(eight, "prior", GraphCache())
    with torch.no_grad():
        for _ in range(3):
            sample = torch.randn(2, 16, 8, 8, device=CUDA)
            made = graphed(sample, time, graphed.condition(**given))
            assert torch.equal(made, eight(sample, time, eight.condition(**given)))
    assert len(graphed.graphs) == 2


@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
@pytest.mark.parametrize("precision", IN_8_BITS)
def test_loras_come_and_go(memory: str, precision: str, tmp_path: Path) -> None:
    cascade = Cascade.load(MINI, CUDA, "bfloat16", memory=memory, precision=precision)
    path = write_lora(tmp_path / "one.safetensors", shapes_of(MINI), 4, size=0.2)
    before = cascade.generate(REQUEST)
    other = cascade.generate(Request(REQUEST.prompt, width=256, height=256, seed=3, loras=[Lora(path)]))
    assert np.abs(np.asarray(before[0], np.int16) - np.asarray(other[0], np.int16)).mean() > 1
    after = cascade.generate(REQUEST)
    assert np.array_equal(np.asarray(before[0]), np.asarray(after[0]))


@pytest.mark.parametrize("precision", IN_8_BITS)
def test_the_base_is_restored_to_the_bit(precision: str, tmp_path: Path) -> None:
    cascade = Cascade.load(MINI, CUDA, "bfloat16", memory="resident", precision=precision)
    path = write_lora(tmp_path / "one.safetensors", shapes_of(MINI), 4, size=0.2)
    cascade.generate(Request("a", width=64, height=64, steps_prior=1, steps_decoder=1, loras=[Lora(path)]))
    cascade.generate(Request("a", width=64, height=64, steps_prior=1, steps_decoder=1))
    fresh = ModelFolder.open(MINI).load_component("prior", device=CUDA, dtype=torch.bfloat16, precision=precision)
    for key, tensor in fresh.state_dict().items():
        assert equal(cascade.prior.state_dict()[key], tensor), key
