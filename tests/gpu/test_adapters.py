"""The kernels never ignore a layer that was changed, wrapped or replaced after loading; state dicts of networks on a GPU."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from cascade.networks.unet import StableCascadeUNet
from cascade.running.graphs import GraphCache, GraphedUNet
from tests.networks.adapters import WAYS, linear_layers, small_change
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

CONFIGS = {"C": STAGE_C | {"block_out_channels": (32, 64)}, "B": STAGE_B}  # heads of 8 channels at least
CASES = [(stage, layer) for stage, config in CONFIGS.items() for layer in linear_layers(StableCascadeUNet(**config))]

pytestmark = pytest.mark.usefixtures("exact_float32")


def make_fast(config: dict) -> StableCascadeUNet:
    """In bfloat16, with the kernels."""
    network = make(config).cuda().bfloat16()
    network.use_kernels("triton")
    return network


def predict(network: StableCascadeUNet, config: dict) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, config.get("in_channels", 16), 8, 8, generator=generator).cuda()
    given = {name: x.cuda() for name, x in inputs(config).items()}
    with torch.no_grad():
        return network(sample, torch.tensor([0.3, 0.9], device="cuda"), **given)


@pytest.mark.parametrize(("stage", "layer"), CASES)
def test_an_adapter_is_the_merged_weight(stage: str, layer: str) -> None:
    config = CONFIGS[stage]
    network = make_fast(config)
    name, first, last = linear_layers(network)[layer]
    # Attention changes a prediction of random weights by little: more of it, so that rounding is less.
    times = 40 if "attention" in name or "kv_mapper" in name else 4
    delta, before = times * small_change(network, name, first, last), predict(network, config)
    merged = copy.deepcopy(network)
    WAYS["merge"](merged, name, delta)
    fresh = StableCascadeUNet(**config).eval().cuda().bfloat16()
    fresh.load_state_dict(merged.state_dict())
    fresh.use_kernels("triton")
    expected = predict(fresh, config)
    change = (expected - before).norm()
    assert change > 0.01 * before.norm()
    for what, way in WAYS.items():
        changed = copy.deepcopy(network)
        way(changed, name, delta)
        # Both are rounded, in other places: in plain torch on a CPU by 0.004 to 0.12 of the change. Ignored, it would be 1.
        assert (predict(changed, config) - expected).norm() < 0.4 * change, what


@pytest.mark.parametrize("stage", CONFIGS)
def test_a_graph_reads_what_is_merged_in_place(stage: str) -> None:
    config = CONFIGS[stage]
    network = make_fast(config)
    run = GraphedUNet(network, stage, GraphCache())
    sample, ratio = torch.randn(2, config.get("in_channels", 16), 8, 8, device="cuda"), torch.rand(2, device="cuda")
    given = {name: x.cuda() for name, x in inputs(config).items()}
    with torch.no_grad():
        for _ in range(2):
            conditions = run.condition(**given, latent_size=(8, 8))
            out = run(sample, ratio, conditions).clone()
            assert torch.equal(out, network(sample, ratio, network.condition(**given, latent_size=(8, 8))))
            for key, tensor in network.state_dict().items():
                if key.endswith(("to_q.weight", "to_v.weight", "mapper.weight", "mapper_sca.weight")):
                    tensor.mul_(1.5)
        assert not torch.equal(run(sample, ratio, run.condition(**given, latent_size=(8, 8))), out)


@pytest.mark.parametrize("stage", CONFIGS)
def test_state_dicts_on_a_gpu(stage: str, tmp_path: Path) -> None:
    network = make_fast(CONFIGS[stage])
    state = network.state_dict()
    expected = {key: tensor.clone() for key, tensor in state.items()}
    network.save_pretrained(tmp_path / "diffusers")
    Accelerator().save_model(network, str(tmp_path / "accelerate"))
    for file in ("diffusers/diffusion_pytorch_model.safetensors", "accelerate/model.safetensors"):
        saved = load_file(tmp_path / file, device="cuda")
        assert saved.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in saved.items())
    empty = StableCascadeUNet(**CONFIGS[stage]).to("meta")
    empty.load_state_dict(expected, assign=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in empty.state_dict().items())
    del network
    torch.cuda.empty_cache()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


@pytest.mark.parametrize("implementation", ["plain", "triton"])
@pytest.mark.parametrize("stage", CONFIGS)
@torch.no_grad()
def test_float16_keeps_a_stream_that_exceeds_it(stage: str, implementation: str) -> None:
    config = CONFIGS[stage]
    exact = make(config, std=0.1).cuda()
    half = copy.deepcopy(exact).half()
    exact.load_state_dict(half.state_dict())
    half.use_kernels(implementation)
    sample, ratio = torch.randn(2, config.get("in_channels", 16), 16, 16, device="cuda"), torch.rand(2, device="cuda")
    given = {name: x.cuda() for name, x in inputs(config).items()}
    for size in (1.0, 1e5):
        residuals = {
            k: size * torch.randn(2, width, 16, 16, device="cuda")
            for k, width in enumerate(config["block_out_channels"][:2])
        }
        out = half(sample, ratio, **given, controlnet_residuals=residuals)
        expected = exact(sample, ratio, **given, controlnet_residuals=residuals)
        assert out.isfinite().all()
        assert (out - expected).norm() < 1e-2 * expected.norm()


@torch.no_grad()
def test_networks_use_plain_torch_until_told() -> None:
    network = make(STAGE_C).cuda().bfloat16()
    assert {module.implementation for module in network.modules() if hasattr(module, "implementation")} == {"plain"}


def test_the_kernels_leave_gradients_to_plain_torch() -> None:
    network = make_fast(STAGE_C)
    given = {name: x.cuda() for name, x in inputs(STAGE_C).items()}
    out = network(torch.randn(2, 16, 8, 8, device="cuda"), torch.rand(2, device="cuda"), **given)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
