"""The attention kernel in Triton's interpreter, which runs it on a CPU, against plain torch."""

import math
from concurrent.futures import Executor

import pytest
import torch
from torch import Tensor

from cascade.kernels import plain
from tests.kernels.interpreting import run

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

HEADS, HEAD = 2, 16
# Of other condition tokens, behind the text.
OTHERS = 8


def attention(
    interpreter: Executor, given: list[Tensor | None], bias: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    return interpreter.submit(run, "attention", *given, 0.0, bias, hidden).result()


def drawn(batch: int, queries: int, context: int, own: bool) -> list[Tensor | None]:
    """Float16: queries, the image's own keys and values, and keys and values of the condition."""
    torch.manual_seed(0)
    query, own_key, own_value = torch.randn(batch, queries, 3 * HEADS * HEAD).half().chunk(3, dim=-1)
    key, value = (
        x.unflatten(-1, (HEADS, HEAD)).transpose(1, 2)
        for x in torch.randn(batch, context, 2 * HEADS * HEAD).half().chunk(2, dim=-1)
    )
    return [query, *((own_key, own_value) if own else (None, None)), key, value]


def exact(given: list[Tensor | None], **options: Tensor | None) -> Tensor:
    return plain.attention(*(None if x is None else x.float() for x in given), 0.0, **options)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


# Numbers of queries: more than one block of 64 has, of which the second is not full, or less. Lengths of texts: 1 to 4 chunks;
# full ones; two that end within one block of 64 keys; none, and one, at which a block begins.
SHAPES = [(20, (77, 154, 231, 308)), (20, (308, 308)), (20, (100, 120, 308, 77)), (70, (0, 1, 64, 128))]


@pytest.mark.parametrize("own", [True, False], ids=["own", "condition alone"])
@pytest.mark.parametrize(("queries", "lengths"), SHAPES, ids=str)
@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
def test_padding_of_a_text(
    interpreter: Executor, queries: int, lengths: tuple[int, ...], own: bool, counted: bool
) -> None:
    """Each sample has the result that it has alone, at its own length, to the bit, whatever the padding holds."""
    longest = max(lengths)
    given = drawn(len(lengths), queries, longest + OTHERS, own)
    for padded in given[3:]:
        for row, length in enumerate(lengths):
            padded[row, :, length:longest] = 3e4
    hidden = torch.tensor([[length, longest - length] for length in lengths], dtype=torch.int32)
    bias = None
    if counted:
        bias = torch.zeros(len(lengths), longest + OTHERS)
        bias[::2, :longest] = math.log(3)
    together = attention(interpreter, given, bias=bias, hidden=hidden)
    close(together, exact(given, bias=bias, hidden=hidden))
    for row, length in enumerate(lengths):
        left = [*range(length), *range(longest, longest + OTHERS)]
        single = [None if x is None else x[row : row + 1] for x in given[:3]]
        single += [x[row : row + 1, :, left] for x in given[3:]]
        own_bias = None if bias is None else bias[row : row + 1, left]
        alone = attention(interpreter, single, bias=own_bias)
        assert torch.equal(together[row], alone[0])
        close(together[row : row + 1], exact(single, bias=own_bias))


def test_nothing_is_hidden(interpreter: Executor) -> None:
    given = drawn(2, 65, 85, own=True)
    without = attention(interpreter, given)
    close(without, exact(given))
    for number in (0, 85):  # of the first key that could be hidden
        hidden = torch.tensor([[number, 0]] * 2, dtype=torch.int32)
        assert torch.equal(attention(interpreter, given, hidden=hidden), without)
    zeros = torch.zeros(2, 85)
    assert torch.equal(attention(interpreter, given, bias=zeros), without)
