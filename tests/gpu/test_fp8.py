"""Products in e4m3 on a GPU: the kernels and products are the plain functions', graphs and memory modes change nothing, and the
pictures are bfloat16's, nearly."""

import copy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cascade import Cascade, Request, kernels
from cascade.kernels import plain
from cascade.kernels.e4m3 import CAPABILITY, E4M3, in_e4m3, multiply, multiply_columns, norm_factor
from cascade.kernels.layers import put_channels_side_by_side
from cascade.kernels.stream import Product, Stream
from cascade.networks import fp8
from cascade.networks.fp8 import Fp8Linear
from cascade.networks.precisions import network_precision
from cascade.networks.unet import StableCascadeUNet
from cascade.running.graphs import GraphCache, GraphedUNet
from cascade.running.placement import GIB
from miniature.icons import STYLES, load_objects
from miniature.prompts import make_prompts
from scripts.stand_ins import NEEDED, write_stand_ins
from tests.components import equal, in_eight_bits_of
from tests.conftest import MINI
from tests.gpu.drawing import draw, error
from tests.gpu.full_size import make_unet, published_config, random_conditions
from tests.networks.test_unet import STAGE_B, STAGE_C, inputs, make

CUDA = torch.device("cuda")
REQUEST = Request("a red apple on a yellow background", width=256, height=256, seed=3)
# The products of the published networks at 1024x1024, Stage C guided, and those of the miniature: rows, inner, columns.
SHAPES = [
    (1152, 2048, 6144),
    (1152, 2048, 8192),
    (1152, 8192, 2048),
    (4608, 2048, 8192),
    (4608, 8192, 2048),
    (1024, 1280, 3840),
    (1024, 1280, 5120),
    (1024, 5120, 1280),
    (256, 1280, 5120),
    (128, 240, 720),
    (35, 160, 640),
    (1, 16, 16),
]

pytestmark = [
    pytest.mark.usefixtures("exact_float32"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY, reason="the GPU has no e4m3"
    ),
]


@pytest.fixture
def triton() -> ModuleType:
    return kernels.load("triton")


def close(made: Tensor, wanted: Tensor) -> None:
    """The same numbers in e4m3, but for some that are rounded to a neighbour."""
    assert made.dtype == wanted.dtype == E4M3
    made, wanted = made.float(), wanted.float()
    assert made.isfinite().all()
    assert ((made - wanted).abs() <= torch.maximum(wanted.abs() / 7, torch.full_like(wanted, 2.0**-9))).all()
    assert (made != wanted).float().mean() < 0.05


def streams(*shape: int) -> list[Stream]:
    batch, *_, channels = shape
    x, bias, value = draw(*shape), draw(channels, dtype=torch.bfloat16), draw(*shape, dtype=torch.bfloat16)
    scale, shift = draw(batch, 2 * channels).chunk(2, dim=1)
    product = Product(1e6 * value, 1e-6 * draw(batch).abs())
    return [
        Stream(x),
        Stream(x, bias, scale, shift),
        Stream(x, bias, product=product),
        Stream(x, bias, scale, shift, product),
    ]


@pytest.mark.parametrize("shape", [(2, 5, 7, 48), (2, 24, 24, 2048), (1, 32, 32, 1280)], ids=str)
@torch.no_grad()
def test_norms(triton: ModuleType, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    channels = shape[-1]
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device="cuda", dtype=torch.bfloat16)
    put_channels_side_by_side(convolution)
    exact = copy.deepcopy(convolution).float()
    for stream in streams(*shape):
        settled, normed = triton.norm(stream, torch.bfloat16, e4m3=True)
        wanted, expected = plain.norm(stream, torch.bfloat16, e4m3=True)
        torch.testing.assert_close(settled.settle(), wanted.settle(), rtol=1e-4, atol=1e-4)
        close(normed, expected)
        settled, normed = triton.depthwise_norm(stream, convolution, torch.bfloat16, e4m3=True)
        wanted, expected = plain.depthwise_norm(stream, exact, torch.float32, e4m3=True)
        torch.testing.assert_close(settled.settle(), wanted.settle(), rtol=1e-4, atol=1e-4)
        close(normed, expected)


@pytest.mark.parametrize("shape", [(2, 5, 7, 48), (1, 130, 6, 48), (2, 24, 24, 8192), (1, 32, 32, 5120)], ids=str)
@torch.no_grad()
def test_responses(triton: ModuleType, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    channels = shape[-1]
    hidden = (2 * draw(*shape) * torch.logspace(-2, 1, channels, device="cuda")).bfloat16()
    gamma, beta = (draw(1, 1, 1, channels, dtype=torch.bfloat16) for _ in range(2))
    wanted, of_wanted = plain.gelu_response_e4m3(hidden, gamma, beta)
    for _ in range(3):  # its counters go back to zero
        made, of_samples = triton.gelu_response_e4m3(hidden, gamma, beta)
        torch.testing.assert_close(of_samples, of_wanted, rtol=1e-3, atol=0)
        both = [one.float() * scales[:, None, None, None] for one, scales in ((made, of_samples), (wanted, of_wanted))]
        assert error(*both) < 0.02


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_products(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    rows, inner, columns = shape
    x, made = in_e4m3(8 * draw(rows, inner)), fp8.quantise(0.02 * draw(columns, inner))
    bias = draw(columns, dtype=torch.bfloat16)
    exact = x.double() @ made.weight.double().T
    # bfloat16's rounding, and sums of 14 bits within a tensor core.
    assert error(multiply(x, *made, None, torch.bfloat16), exact * made.scale[0]) < 5e-3
    for function, scale in ((multiply, made.scale), (multiply_columns, 0.01 * torch.rand(columns, 1, device=CUDA))):
        wanted = 0.125 * exact * scale.double().T + bias
        assert error(function(x, made.weight, scale, bias, torch.bfloat16, 0.125), wanted) < 5e-3


def test_a_gpu_rounds_as_a_cpu() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(512, 2048)
    matrix[3] = 0
    for one, other in zip(fp8.quantise(matrix.to(CUDA)), fp8.quantise(matrix), strict=True):
        assert equal(one.cpu(), other)


@pytest.mark.parametrize("shape", [(6144, 2048), (2048, 8192), (160, 240)])
def test_matrices(triton: ModuleType, shape: tuple[int, int]) -> None:
    made = fp8.quantise(draw(*shape))
    assert torch.equal(triton.dequantise(*made, torch.bfloat16), plain.dequantise(*made, torch.bfloat16))


@pytest.mark.parametrize(("name", "config", "channels"), [("prior", STAGE_C, 16), ("decoder", STAGE_B, 4)])
@torch.no_grad()
def test_predictions_are_those_of_the_plain_functions(name: str, config: dict, channels: int) -> None:
    original = make(config).to(CUDA, torch.bfloat16)
    fast = in_eight_bits_of(original, name, "fp8")
    given = {key: tensor.to(CUDA, torch.bfloat16) for key, tensor in inputs(config).items()}
    sample, time = draw(2, channels, 8, 8), torch.full((2,), 0.3, device=CUDA)
    exact = copy.deepcopy(original).float()(sample, time, **{key: tensor.float() for key, tensor in given.items()})
    errors = []
    for implementation in ("plain", "triton"):
        fast.use_kernels(implementation)
        errors.append(error(fast(sample, time, **given), exact))
    assert 0.005 < errors[1] <= 1.3 * errors[0] < 0.15


@pytest.mark.parametrize(("name", "bound"), [("prior", 0.05), ("decoder", 0.12)])
@torch.no_grad()
def test_predictions_of_the_published_size(name: str, bound: float) -> None:
    """Random weights. Also that a picture does not depend on its neighbour in the batch."""
    latent_size = (24, 24) if name == "prior" else (256, 256)
    config = published_config(name)
    exact = make_unet(config, latent_size=latent_size, semantic_size=(24, 24), seed=0, device="cuda")
    half = copy.deepcopy(exact).bfloat16()
    fast = in_eight_bits_of(half, name, "fp8")
    for network in (half, fast):
        network.use_kernels("triton")
    torch.manual_seed(4)
    conditions = {key: x.cuda() for key, x in random_conditions(exact.config, (24, 24), 2).items()}
    for time in (0.99, 0.5, 0.1):
        sample, ratio = draw(2, exact.config.in_channels, *latent_size), torch.full((2,), time, device="cuda")
        expected, made = exact(sample, ratio, **conditions), fast(sample, ratio, **conditions)
        errors = [error(half(sample, ratio, **conditions), expected), error(made, expected)]
        print(f"{name}, t {time}: bfloat16 {errors[0]:.2%}, fp8 {errors[1]:.2%}")
        assert errors[1] < bound
        sample[1] *= 100
        assert torch.equal(fast(sample, ratio, **conditions)[0], made[0])


@pytest.fixture(scope="module")
def resident() -> Cascade:
    return Cascade.load(MINI, CUDA, "bfloat16", memory="resident", precision="fp8")


def difference(one: Cascade, other: Cascade, request: Request = REQUEST) -> float:
    """Mean, of 255."""
    pictures = [np.asarray(cascade.generate(request)[0], np.float32) for cascade in (one, other)]
    return float(np.abs(pictures[0] - pictures[1]).mean())


@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_memory_modes_make_the_same_pictures(memory: str, resident: Cascade) -> None:
    cascade = Cascade.load(MINI, CUDA, "bfloat16", memory=memory, precision="fp8")
    assert cascade.precision == resident.precision == "fp8"
    assert difference(cascade, resident) < 0.5


@torch.no_grad()
def test_graphs_change_nothing() -> None:
    fast = in_eight_bits_of(make(STAGE_C).to(CUDA, torch.bfloat16), "prior", "fp8")
    fast.use_kernels("triton")
    given = {key: tensor.to(CUDA, torch.bfloat16) for key, tensor in inputs(STAGE_C).items()}
    time = torch.full((2,), 0.3, device=CUDA)
    graphed = GraphedUNet(fast, "prior", GraphCache())
    for side in (8, 8, 12, 8):
        sample = draw(2, 16, side, side)
        made = graphed(sample, time, graphed.condition(**given))
        assert torch.equal(made, fast(sample, time, fast.condition(**given)))


@torch.no_grad()
def test_no_pass_of_its_own_rounds_or_scales_activations() -> None:
    """torch's own kernels, other than products, are as many as in bfloat16."""
    counts = {}
    for precision in ("full", "fp8"):
        network: StableCascadeUNet = make(STAGE_C).to(CUDA, torch.bfloat16)
        if precision == "fp8":
            network = in_eight_bits_of(network, "prior", precision)
        network.use_kernels("triton")
        given = {key: tensor.to(CUDA, torch.bfloat16) for key, tensor in inputs(STAGE_C).items()}
        sample, time = draw(2, 16, 8, 8), torch.full((2,), 0.3, device=CUDA)
        conditions = network.condition(**given)
        network(sample, time, conditions)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            network(sample, time, conditions)
            torch.cuda.synchronize()
        counts[precision] = sum(event.count for event in profile.key_averages() if "at::native" in event.key)
    assert 0 < counts["fp8"] <= counts["full"]


def test_float16_stays_full() -> None:
    assert Cascade.load(MINI, CUDA, "float16", precision="fp8").precision == "full"


def test_pictures_are_nearly_those_of_bfloat16(resident: Cascade) -> None:
    """64 prompts on the miniature."""
    half = Cascade.load(MINI, CUDA, "bfloat16", memory="resident", precision="full")
    prompts = make_prompts([one.name for one in load_objects()], STYLES, 0, 64)
    differences = [difference(resident, half, Request(prompt.text, seed=prompt.seed)) for prompt in prompts]
    print(f"mean difference of 255: {np.mean(differences):.3f}, of the worst picture {max(differences):.3f}")
    assert len(differences) == 64
    assert np.mean(differences) <= 2


def test_memory_of_the_published_size(tmp_path: Path) -> None:
    """At most 8 GiB, with guidance in both stages. Needs 12 GB of disk."""
    write_stand_ins(tmp_path, "cuda", NEEDED)
    torch.cuda.empty_cache()
    cascade = Cascade.load(tmp_path, CUDA, "bfloat16", memory="resident", precision="fp8")
    assert network_precision(cascade.decoder) == "fp8"
    layers = [layer for layer in cascade.prior.modules() if isinstance(layer, Fp8Linear)]
    assert norm_factor(2048) == 8
    assert len(layers) == 64 + 2 * 62  # to_qkv, and MLPs but for the last block's and that with a skip connection
    torch.cuda.reset_peak_memory_stats()
    cascade.generate(Request("a lighthouse", width=1024, height=1024, guidance_scale_decoder=1.1))
    peak = torch.cuda.max_memory_allocated() / GIB
    print(f"peak {peak:.2f} GiB")
    assert peak <= 8
