"""Preparing kernels runs the networks' blocks, but computes no matrix product."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cascade.networks.stage_a import StageA
from cascade.networks.unet import AttnBlock, StableCascadeUNet
from cascade.running.precompile import WithoutProducts, jobs_of
from tests.components import in_eight_bits_of, make_decoder, make_prior
from tests.readme import ROOT


class Called(TorchDispatchMode):
    """Notes the operations that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["full", "int8", "fp8"])
def networks(request: pytest.FixtureRequest) -> tuple[list[StableCascadeUNet], StageA]:
    unets = {"prior": make_prior(), "decoder": make_decoder()}
    if request.param != "full":
        unets = {name: in_eight_bits_of(network, name, request.param) for name, network in unets.items()}
    return list(unets.values()), StageA(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)


def test_all_blocks_run_without_products(networks: tuple[list[StableCascadeUNet], StageA]) -> None:
    with Called() as called:
        for job in jobs_of(*networks):
            job()
    assert {"native_layer_norm", "gelu", "convolution"} <= called.names
    # Without a GPU, attention is plain torch's, which multiplies batches of matrices on a CPU.
    assert {name for name in called.names if "mm" in name or name == "linear"} <= {"bmm"}


def test_large_pictures_have_kernels_of_their_own() -> None:
    """Of attention alone: with and without pending operations, and in Stage C with hidden and biased keys."""
    vqgan = StageA(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)
    for unet, kinds in ((make_prior(), 4), (make_decoder(), 2)):
        widths = {block.attention.channels for block in unet.blocks() if isinstance(block, AttnBlock)}
        more = len(jobs_of([unet], vqgan, large=True)) - len(jobs_of([unet], vqgan))
        assert more == kinds * len(widths) > 0


@pytest.mark.slow
def test_the_compiler_is_not_imported() -> None:
    program = """
import sys, torch
from cascade.running.precompile import WithoutProducts
with WithoutProducts():
    torch.ones(2, 2) @ torch.ones(2, 2) + 1
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)


def test_results_have_the_shapes_and_dtypes_of_products() -> None:
    matrix, bias = torch.ones(3, 5), torch.ones(7)
    layer = torch.nn.Linear(5, 7).bfloat16()
    e4m3, one = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.ones(())
    rows, hidden = torch.zeros(3, 7), torch.ones(3, 5)
    with torch.no_grad():
        for function in (
            lambda: layer(torch.ones(2, 4, 5).bfloat16()),
            lambda: torch.nn.Linear(5, 7, bias=False)(matrix),
            lambda: torch._addmm_activation(bias, matrix, torch.ones(5, 7), use_gelu=True),
            lambda: torch._scaled_mm(e4m3, e4m3.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
            lambda: torch.addmm(rows, hidden, torch.ones(5, 7), out=rows),
        ):
            expected = function()
            with Called() as called, WithoutProducts():
                made = function()
            assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
            assert not {name for name in called.names if "mm" in name}
    assert torch.equal(rows, torch.full((3, 7), 5.0))  # as the product with values left it
