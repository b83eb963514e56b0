"""The kernels that make and read numbers in e4m3, in Triton's interpreter, against plain torch."""

from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor, nn

from cascade.kernels import plain
from cascade.kernels.e4m3 import E4M3, norm_factor
from cascade.kernels.stream import Product, Stream
from tests.components import equal
from tests.kernels.interpreting import run

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 6, 48)


def close(made: Tensor, wanted: Tensor) -> None:
    """The same numbers in e4m3, but for a few that are rounded to a neighbour, because sums are in another order."""
    assert made.dtype == wanted.dtype == E4M3
    made, wanted = made.float(), wanted.float()
    assert made.isfinite().all()
    assert ((made - wanted).abs() <= torch.maximum(wanted.abs() / 8, torch.tensor(2.0**-9))).all()
    assert (made != wanted).float().mean() < 0.01


def streams() -> list[Stream]:
    torch.manual_seed(0)
    batch, *_, channels = SHAPE
    x, bias, value = torch.randn(SHAPE), torch.randn(channels), torch.randn(SHAPE)
    scale, shift = torch.randn(batch, 2 * channels).chunk(2, dim=1)
    product = Product(1e5 * value, 1e-5 * torch.rand(batch))
    return [
        Stream(x),
        Stream(x, bias, scale, shift),
        Stream(x, product=product),
        Stream(x, bias, product=product),
        Stream(x, bias, scale, shift, product),
    ]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("e4m3", [False, True])
def test_norms(interpreter: Executor, number: int, e4m3: bool) -> None:
    stream = streams()[number]
    settled, normed = interpreter.submit(run, "norm", stream, torch.float32, e4m3=e4m3).result()
    wanted, exact = plain.norm(stream, torch.float32, e4m3=e4m3)
    torch.testing.assert_close(settled.settle(), wanted.settle())
    if e4m3:
        close(normed, exact)
        assert normed.float().abs().max() > 0.5 * norm_factor(SHAPE[-1])
    else:
        torch.testing.assert_close(normed, exact)


@pytest.mark.parametrize("number", range(5))
def test_depthwise_norms(interpreter: Executor, number: int) -> None:
    stream, channels = streams()[number], SHAPE[-1]
    convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels).requires_grad_(False)
    given = (stream, convolution, torch.float32)
    settled, normed = interpreter.submit(run, "depthwise_norm", *given, e4m3=True).result()
    wanted, exact = plain.depthwise_norm(*given, e4m3=True)
    torch.testing.assert_close(settled.settle(), wanted.settle())
    close(normed, exact)


# Rows and channels that do not fill a block; several parts of a sample's rows, of which the last is not full.
@pytest.mark.parametrize("shape", [(2, 3, 6, 48), (1, 8, 9, 160), (2, 9, 31, 32)], ids=str)
def test_responses(interpreter: Executor, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    channels = shape[-1]
    hidden = torch.randn(shape) * torch.tensor([1.0, 300.0])[: shape[0], None, None, None]
    gamma, beta = torch.randn(2, 1, 1, 1, channels)
    given = (hidden * torch.logspace(-2, 1, channels), gamma, beta)
    made, of_samples = interpreter.submit(run, "gelu_response_e4m3", *given).result()
    wanted, of_wanted = plain.gelu_response_e4m3(*given)
    torch.testing.assert_close(of_samples, of_wanted, rtol=1e-3, atol=0)
    value, exact = (
        one.float() * scales[:, None, None, None] for one, scales in ((made, of_samples), (wanted, of_wanted))
    )
    # GELU is fitted to 2.7e-5.
    allowed = torch.maximum(exact.abs() / 7, 3 * 2.0**-9 * of_wanted[:, None, None, None])
    assert ((value - exact).abs() <= allowed).all()
    assert ((value - exact).norm() / exact.norm()).item() < 0.01
    alone, _ = interpreter.submit(run, "gelu_response_e4m3", given[0][:1], *given[1:]).result()
    assert equal(alone, made[:1])


def test_responses_of_zeros(interpreter: Executor) -> None:
    zeros = torch.zeros(1, 2, 2, 16)
    given = (zeros, torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 1, 16))
    made, of_samples = interpreter.submit(run, "gelu_response_e4m3", *given).result()
    assert made.float().abs().max() == 0
    assert of_samples.isfinite().all()


def test_matrices(interpreter: Executor) -> None:
    torch.manual_seed(2)
    weight, scale = torch.randn(5, 48).to(E4M3), torch.rand(5, 1)
    made = interpreter.submit(run, "dequantise", weight, scale, torch.float32).result()
    assert torch.equal(made, plain.dequantise(weight, scale, torch.float32))
