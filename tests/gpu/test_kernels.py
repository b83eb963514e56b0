"""The fast path changes nothing: kernels are the plain functions, graphs are the network, pictures are the same."""

import copy
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from cascade import kernels
from cascade.kernels import plain
from cascade.kernels.layers import put_channels_side_by_side
from cascade.kernels.stream import Stream
from cascade.networks.stage_a import MixingBlock
from cascade.networks.unet import StableCascadeUNet
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.running.graphs import SIZES, GraphCache, GraphedUNet
from miniature.icons import STYLES, load_objects
from miniature.prompts import make_prompts
from tests.gpu.drawing import draw, error
from tests.gpu.full_size import make_unet, published_config, random_conditions

ROOT = Path(__file__).parents[2]
ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 1e-3}
# Few, because each compiles a dozen kernels: odd sizes of two samples, in both dtypes, and those of Stage C.
CASES = [((2, 5, 7, 48), torch.bfloat16), ((2, 5, 7, 48), torch.float16), ((1, 24, 24, 2048), torch.bfloat16)]

pytestmark = [pytest.mark.usefixtures("exact_float32"), pytest.mark.usefixtures("no_grad")]


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def triton() -> ModuleType:
    return kernels.load("triton")


def streams(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> list[Stream]:
    x, bias = draw(batch, height, width, channels), draw(channels, dtype=dtype)
    scale, shift = draw(batch, 2 * channels).chunk(2, dim=1)
    return [Stream(x), Stream(x, bias, scale, shift)]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_norms(triton: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    channels = shape[-1]
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device="cuda", dtype=dtype)
    exact, skip = copy.deepcopy(convolution).float(), draw(*shape)
    for arranged in (False, True):
        if arranged:
            put_channels_side_by_side(convolution)
        for stream in streams(*shape, dtype):
            expected = stream.settle()
            for given in (None, skip):
                settled, normed = triton.depthwise_norm(stream, convolution, dtype, given)
                _, wanted = plain.depthwise_norm(Stream(expected), exact, torch.float32, given)
                assert normed.dtype == (dtype if given is None or dtype == torch.bfloat16 else torch.float32)
                torch.testing.assert_close(settled.settle(), expected)
                assert error(normed, wanted) < ROUNDING[dtype]
    out = nn.Linear(channels, channels, device="cuda", dtype=dtype)
    hidden = draw(*shape, dtype=dtype)
    for stream in streams(*shape, dtype):
        expected = stream.settle()
        settled, normed = triton.norm(stream, dtype)
        torch.testing.assert_close(settled.x, expected)
        assert normed.dtype == dtype
        assert error(normed, plain.layer_norm(expected)) < ROUNDING[dtype]
        wanted = expected + F.linear(hidden.float(), out.weight.float(), out.bias.float())
        # The first two change in place what they are given.
        after, _ = triton.norm(stream, dtype, next_linear=out)
        torch.testing.assert_close(after.x, expected + out.bias)
        assert error(triton.add_linear(after, hidden, out, after_norm=True).settle(), wanted) < 1e-5
        copied = Stream(settled.x.clone())
        assert error(triton.add_linear(copied, hidden, out).settle(), wanted) < 1e-5
        # A layer that must be called: nothing of it is added early.
        wrapped = nn.Sequential(out)
        after, _ = triton.norm(stream, dtype, next_linear=wrapped)
        torch.testing.assert_close(after.settle(), expected)
        assert error(triton.add_linear(after, hidden, wrapped, after_norm=True).settle(), wanted) < ROUNDING[dtype]


@pytest.mark.parametrize(("shape", "dtype"), [*CASES, ((1, 130, 6, 48), torch.bfloat16)])
def test_gelu_and_response(triton: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    hidden = 2 * draw(*shape, dtype=dtype)
    hidden.view(-1)[0] = 40.0  # far outside of what GELU was fitted to
    gamma, beta = (draw(1, 1, 1, shape[-1], dtype=dtype) for _ in range(2))
    expected = plain.gelu_response(hidden.float(), gamma.float(), beta.float())
    for _ in range(3):  # its counters go back to zero
        assert error(triton.gelu_response(hidden.clone(), gamma, beta), expected) < ROUNDING[dtype]
    # As after a skip connection in float16.
    assert error(triton.gelu_response(hidden.float(), gamma, beta), expected) < ROUNDING[torch.float16]


@pytest.mark.parametrize(("head", "dtype"), [(48, torch.bfloat16), (64, torch.bfloat16), (64, torch.float16)])
@pytest.mark.parametrize(
    ("batch", "tokens", "context"), [(1, 1, 1), (2, 576, 85), (1, 1024, 4), (2, 77, 97), (2, 2500, 85)]
)
def test_attention(triton: ModuleType, batch: int, tokens: int, context: int, head: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    heads = 3
    query, own_key, own_value = draw(batch, tokens, 3 * heads * head, dtype=dtype).chunk(3, dim=-1)
    # Halves of one tensor, as `Attention.key_value` gives them.
    key, value = (
        x.unflatten(-1, (heads, head)).transpose(1, 2)
        for x in draw(batch, context, 2 * heads * head, dtype=dtype).chunk(2, dim=-1)
    )
    for given in ((query, own_key, own_value, key, value), (query, None, None, key, value)):
        expected = plain.attention(*(None if x is None else x.float() for x in given))
        assert error(triton.attention(*given), expected) < ROUNDING[dtype]
        dense = (*given[:3], key.clone(), value.clone())
        assert torch.equal(triton.attention(*dense), triton.attention(*given))


def attention_inputs(batch: int, tokens: int, context: int, dtype: torch.dtype) -> list[tuple[Tensor | None, ...]]:
    """With the image's own keys and without."""
    heads, head = 3, 64
    query, own_key, own_value = draw(batch, tokens, 3 * heads * head, dtype=dtype).chunk(3, dim=-1)
    key, value = (
        x.unflatten(-1, (heads, head)).transpose(1, 2)
        for x in draw(batch, context, 2 * heads * head, dtype=dtype).chunk(2, dim=-1)
    )
    return [(query, own_key, own_value, key, value), (query, None, None, key, value)]


def exact_attention(given: tuple[Tensor | None, ...], **options: Tensor) -> Tensor:
    return plain.attention(*(None if x is None else x.float() for x in given), 0.0, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2500, 576, 77])
def test_attention_with_a_bias(triton: ModuleType, tokens: int, dtype: torch.dtype) -> None:
    """Zeros change nothing, to the bit."""
    torch.manual_seed(2)
    bias = torch.zeros(2, 158, device="cuda")
    bias[1, :77] = math.log(3)
    for given in attention_inputs(2, tokens, 158, dtype):
        expected, without = exact_attention(given, bias=bias), triton.attention(*given)
        assert error(triton.attention(*given, 0.0, bias), expected) < ROUNDING[dtype]
        torch.testing.assert_close(triton.attention(*given, 0.0, torch.zeros_like(bias)), without, atol=0, rtol=0)
        assert error(without, expected) > ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2500, 576, 77])
@pytest.mark.parametrize("counted", [False, True])
def test_attention_that_leaves_out_padding(triton: ModuleType, tokens: int, dtype: torch.dtype, counted: bool) -> None:
    """Texts of 0 to 4 chunks in one batch: each has the result that it has alone, to the bit."""
    torch.manual_seed(2)
    lengths, longest, context = [77, 308, 154, 231, 64, 0], 308, 316
    hidden = torch.tensor([[length, longest - length] for length in lengths], dtype=torch.int32, device="cuda")
    options = {"hidden": hidden}
    if counted:
        options["bias"] = torch.zeros(len(lengths), context, device="cuda")
        options["bias"][::2, :longest] = math.log(3)
    for given in attention_inputs(len(lengths), tokens, context, dtype):
        for padded in given[3:]:
            for row, length in enumerate(lengths):
                padded[row, :, length:longest] = 3e4
        together = triton.attention(*given, **options)
        assert error(together, exact_attention(given, **options)) < ROUNDING[dtype]
        for row, length in enumerate(lengths):
            left = [*range(length), *range(longest, context)]
            alone = [None if x is None else x[row : row + 1] for x in given[:3]]
            alone += [x[row : row + 1, :, left] for x in given[3:]]
            bias = options["bias"][row : row + 1, left] if counted else None
            assert torch.equal(together[row], triton.attention(*alone, bias=bias)[0])
    assert torch.equal(triton.attention(*given, hidden=torch.zeros_like(hidden)), triton.attention(*given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("conditions", [1, 2, 3])
def test_timestep_maps(triton: ModuleType, conditions: int, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    mappers = [nn.Linear(64, 1000, device="cuda", dtype=dtype) for _ in range(conditions)]
    times = draw(conditions, 3, 64)
    expected = plain.timestep_maps([copy.deepcopy(mapper).float() for mapper in mappers], times, torch.float32)
    out = triton.timestep_maps(mappers, times, dtype)
    assert out.dtype == torch.float32
    assert error(out, expected) < 1e-6
    mappers[-1] = nn.Sequential(mappers[-1])
    assert error(triton.timestep_maps(mappers, times, dtype), expected) < ROUNDING[dtype]


@pytest.mark.parametrize(("channels", "height", "width"), [(384, 33, 18), (192, 5, 7), (64, 1, 1)])
def test_stage_a_block(channels: int, height: int, width: int) -> None:
    torch.manual_seed(3)
    block = MixingBlock(channels).cuda().bfloat16()
    x = draw(2, channels, height, width, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    for _ in range(2):  # the gates may change after the block has run
        nn.init.normal_(block.gammas, std=0.5)
        expected = copy.deepcopy(block).float()
        expected.use_kernels("plain")
        expected = expected(x.float())
        block.use_kernels("plain")
        inexact = error(block(x), expected)
        block.use_kernels("triton")
        assert error(block(x), expected) <= 1.1 * inexact
        wrapped = copy.deepcopy(block)
        wrapped.channelwise[2] = nn.Sequential(wrapped.channelwise[2])
        assert error(wrapped(x), expected) <= 1.1 * inexact


@pytest.fixture(scope="module", params=["prior", "decoder"])
def full_size(request: pytest.FixtureRequest) -> tuple[StableCascadeUNet, tuple[int, int]]:
    latent_size = (24, 24) if request.param == "prior" else (256, 256)
    config = published_config(request.param)
    return make_unet(config, latent_size=latent_size, semantic_size=(24, 24), seed=0, device="cuda"), latent_size


def test_no_less_exact_than_plain_torch(full_size: tuple[StableCascadeUNet, tuple[int, int]]) -> None:
    exact, latent_size = full_size
    half = copy.deepcopy(exact).bfloat16()
    torch.manual_seed(4)
    conditions = {name: x.cuda() for name, x in random_conditions(exact.config, (24, 24), 2).items()}
    for time in (0.99, 0.5, 0.1):
        sample, ratio = draw(2, exact.config.in_channels, *latent_size), torch.full((2,), time, device="cuda")
        expected = exact(sample, ratio, **conditions)
        half.use_kernels("plain")
        slow = error(half(sample, ratio, **conditions), expected)
        half.use_kernels("triton")
        fast = error(half(sample, ratio, **conditions), expected)
        print(f"{exact.config.in_channels} channels, t {time}: plain {slow:.3e}, fast {fast:.3e}")
        assert fast <= slow


def test_graphs_do_what_the_network_does(model_folder: Path) -> None:
    cascade = Cascade.load(model_folder, "cuda")
    for network, channels in ((cascade.prior, 16), (cascade.decoder, 4)):
        graphs = GraphCache()
        run = GraphedUNet(network, "network", graphs)
        torch.manual_seed(5)
        given = {name: x.cuda() for name, x in random_conditions(dict(network.config), (6, 6), 2).items()}
        for side in (8, 12, *range(14, 16 + 2 * SIZES, 2), 8):  # more sizes than are kept, then the first again
            sample, ratio = draw(2, channels, side, side), torch.rand(2, device="cuda")
            expected = network.condition(**given, latent_size=(side, side))
            with graphs.of((side, side)):
                conditions = run.condition(**given, latent_size=(side, side))
                width = network.config.block_out_channels[0]
                for residuals in (None, {0: draw(2, width, side, side)} if channels == 16 else None):
                    out = run(sample, ratio, conditions, controlnet_residuals=residuals).clone()
                    assert torch.equal(out, network(sample, ratio, expected, controlnet_residuals=residuals))
                other = run(sample + 1, ratio, conditions)
                assert torch.equal(other, network(sample + 1, ratio, expected))
        assert len(graphs.sizes) == SIZES


@torch.no_grad()
def test_the_text_encoders_graph_is_transformers_text_encoder(model_folder: Path) -> None:
    text = Cascade.load(model_folder, "cuda").text
    tokenizer = CLIPTokenizer.from_pretrained(model_folder / "tokenizer")
    encoder = CLIPTextModelWithProjection.from_pretrained(model_folder / "text_encoder").to("cuda", text.encoder.dtype)
    for prompt in ("", "a red apple", "a " * 90):
        ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").to("cuda")
        output = encoder.eval()(**ids, output_hidden_states=True)
        (embeddings,) = text.encode_each([prompt], most_chunks=1)
        torch.testing.assert_close(embeddings.tokens, output.hidden_states[-1])
        torch.testing.assert_close(embeddings.pooled[:, 0], output.text_embeds)


def test_pictures_are_those_of_plain_float32() -> None:
    """On the miniature, 64 prompts: by kernels and graphs in bfloat16, and by torch in float32."""
    folder = ROOT / "weights" / "mini"
    prompts = make_prompts([one.name for one in load_objects()], STYLES, 0, 64)
    fast, exact = Cascade.load(folder, "cuda"), Cascade.load(folder, "cuda", torch.float32)
    differences = []
    for prompt in prompts:
        request = Request(prompt.text, seed=prompt.seed)
        (one,) = fast.generate(request)
        (other,) = exact.generate(request)
        differences.append(np.abs(np.asarray(one).astype(float) - np.asarray(other)).mean())
    print(f"mean difference of 255: {np.mean(differences):.3f}, of the worst picture {max(differences):.3f}")
    assert len(differences) == 64
    assert np.mean(differences) <= 2
