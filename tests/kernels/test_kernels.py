"""The choice between plain torch and GPU kernels, and plain torch with values that exceed float16."""

import importlib.util
import inspect

import pytest
import torch
from torch import nn

from cascade import kernels
from cascade.kernels import plain
from cascade.kernels.stream import Stream
from cascade.networks.stage_a import StageA
from tests.components import copied
from tests.networks.adapters import WAYS
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

GPU = torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "name", "reason"),
    [
        ("cpu", torch.bfloat16, (9, 0), "plain", "need a CUDA GPU, and the device is cpu"),
        ("mps", torch.float16, (9, 0), "plain", "need a CUDA GPU, and the device is mps"),
        ("cuda:0", torch.float32, (9, 0), "plain", "need bfloat16 or float16, and the dtype is float32"),
        ("cuda:1", torch.float16, (7, 5), "plain", "need compute capability 8.0, and the GPU has 7.5"),
        pytest.param("cuda:0", torch.bfloat16, (8, 0), "triton", "capability 8.0", marks=needs_triton),
        pytest.param("cuda:0", torch.float16, (12, 0), "triton", "capability 12.0", marks=needs_triton),
    ],
)
def test_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    choice = kernels.choose(torch.device(device), dtype)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "said"),
    [
        ("cpu", torch.bfloat16, (9, 0), "products in 8 bits need a CUDA GPU, and the device is cpu"),
        ("cuda:0", torch.float16, (9, 0), "products in 8 bits need bfloat16, and the dtype is float16"),
        ("cuda:0", torch.bfloat16, (8, 6), "products in 8 bits need compute capability 8.9, and the GPU has 8.6"),
        ("cuda:0", torch.bfloat16, (8, 9), None),
        ("cuda:0", torch.bfloat16, (9, 0), None),
    ],
)
def test_what_multiplies_in_e4m3(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, capability: tuple[int, int], said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert kernels.lacks_e4m3(torch.device(device), dtype) == said


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def absent(_: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(kernels, "load", absent)
    assert kernels.choose(GPU, torch.bfloat16) == ("plain", "Triton is not installed, which makes the networks slower")


@needs_triton
def test_both_have_the_same_functions() -> None:
    triton = kernels.load("triton")
    names = {
        name for name, function in inspect.getmembers(triton, inspect.isfunction) if not name.startswith(("_", "is_"))
    }
    assert names == {
        "norm", "linear", "add_linear", "depthwise_norm", "gelu_response", "attention", "timestep_maps", "mixing_block",
        "dequantise", "gelu_response_e4m3",
    }  # fmt: skip
    for name in names:
        assert inspect.signature(getattr(triton, name)) == inspect.signature(getattr(plain, name)), name


@needs_triton
def test_the_implementation_is_set_for_all_blocks() -> None:
    for network in (make(STAGE_C), StageA(embed_dim=16, bottleneck_blocks=1, num_vq_embeddings=4)):
        before = {name: parameter.clone() for name, parameter in network.named_parameters()}
        users = [module for module in network.modules() if isinstance(module, kernels.UsesKernels)]
        assert len(users) > 4
        assert {module.implementation for module in users} == {"plain"}
        network.use_kernels("triton")
        with torch.no_grad():
            assert {module.kernels for module in users} == {kernels.load("triton")}
            twin = copied(network)
            assert {module.kernels for module in twin.modules() if isinstance(module, kernels.UsesKernels)} == {
                kernels.load("triton")
            }
        # The kernels have no backward pass.
        assert {module.kernels for module in users} == {plain}
        assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
        network.use_kernels("plain")
        with torch.no_grad():
            assert {module.kernels for module in users} == {plain}
    with pytest.raises(ValueError, match="The implementation is 'fast'; it must be one of plain, triton"):
        network.use_kernels("fast")


@pytest.mark.parametrize("config", [STAGE_C, STAGE_B], ids=["C", "B"])
@torch.no_grad()
def test_float16_keeps_a_stream_that_exceeds_it(config: dict) -> None:
    """In every level: norms, convolutions, skip connections and the convolutions between repeats."""
    exact = make(config, std=0.1)
    half = copied(exact).half()
    exact.load_state_dict(half.state_dict())  # rounded
    sample, ratio = torch.randn(2, config.get("in_channels", 16), 16, 16), torch.tensor([0.3, 0.9])
    widths = config["block_out_channels"]
    given = inputs(config)
    seen: list[float] = []
    for block in half.blocks():
        block.register_forward_hook(lambda _, args, out: seen.append(out.settle().abs().max().item()))
    for size in (1.0, 1e5):
        residuals = {0: size * torch.randn(2, widths[0], 16, 16), 1: size * torch.randn(2, widths[1], 16, 16)}
        seen.clear()
        out = half(sample, ratio, **given, controlnet_residuals=residuals)
        expected = exact(sample, ratio, **given, controlnet_residuals=residuals)
        assert max(seen) > size
        assert out.isfinite().all()
        assert (out - expected).norm() < 1e-2 * expected.norm()


@torch.no_grad()
def test_float16_adds_what_exceeds_it() -> None:
    layer = nn.Linear(4, 4).half()
    layer.weight.fill_(1000)
    hidden = torch.full((1, 2, 2, 4), 100.0)
    for given in (hidden.half(), hidden):
        out = plain.add_linear(Stream(torch.ones(1, 2, 2, 4)), given, layer).settle()
        torch.testing.assert_close(out, 400_001 + layer.bias.float().expand_as(out))
    wide = plain.linear(layer, 100 * hidden, torch.float16)
    assert wide.dtype == torch.float32
    assert wide.isfinite().all()
    assert plain.linear(layer, hidden.half(), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["inside", "wrap", "replace_forward", "hook"])
@torch.no_grad()
def test_wrapped_layers_in_16_bits(way: str, dtype: torch.dtype) -> None:
    network = make(STAGE_B).to(dtype)
    sample, ratio, given = torch.randn(1, 4, 8, 8), torch.rand(1), inputs(STAGE_B, 1)
    expected = network(sample, ratio, **given)
    for name, layer in list(network.named_modules()):
        if way == "inside" and isinstance(layer, nn.Linear | nn.Conv2d) and ("blocks" in name or "mappers" in name):
            network.set_submodule(name, nn.Sequential(layer))
        elif way != "inside" and isinstance(layer, nn.Linear):
            WAYS[way](network, name, torch.zeros_like(layer.weight))
    out = network(sample, ratio, **given)
    assert (out - expected).norm() < 1e-2 * expected.norm()
