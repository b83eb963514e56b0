"""How texts of unlike lengths share a batch, and ComfyUI's repetition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.prompts.text import TextEmbeddings, joined, repeated


def text(chunks: int, batch: int = 1) -> TextEmbeddings:
    return TextEmbeddings(torch.randn(batch, 77 * chunks, 4), torch.randn(batch, 1, 3))


def test_texts_of_one_length_are_a_batch_without_padding() -> None:
    texts = [text(2), text(2, batch=3)]
    whole = joined(texts)
    assert torch.equal(whole.tokens, torch.cat([one.tokens for one in texts]))
    assert torch.equal(whole.pooled, torch.cat([one.pooled for one in texts]))
    assert whole.bias is None
    assert whole.lengths is None


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_texts_come_out_as_they_went_in(chunks: list[int]) -> None:
    texts = [text(number) for number in chunks]
    whole = joined(texts)
    assert whole.bias is None
    if len(set(chunks)) == 1:
        assert whole.lengths is None
    else:
        assert whole.lengths.dtype == torch.int32
        assert whole.lengths.tolist() == [77 * number for number in chunks]
    for row, one in enumerate(texts):
        length = one.tokens.shape[1]
        assert torch.equal(whole.tokens[row, :length], one.tokens[0])
        assert torch.equal(whole.pooled[row], one.pooled[0])
        assert not whole.tokens[row, length:].any()


@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_joining_twice_is_joining_once(first: int, chunks: list[int], counted: bool) -> None:
    """As for a batch of pictures, then its two halves."""
    texts = [text(first), *(text(number) for number in chunks)]
    if counted:
        texts[0], texts[1] = repeated(texts[0], texts[1])
    once, twice = joined(texts), joined([texts[0], joined(texts[1:])])
    for one, other in zip(once, twice, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def test_texts_that_count_several_times_among_others() -> None:
    """The logits of padding do not matter, but it must be known: kernels with a bias are compiled for texts with lengths."""
    single, double = repeated(text(1), text(2))
    assert double.bias is None
    whole = joined([single, double])
    log2 = pytest.approx(math.log(2))
    assert whole.bias.tolist() == [[log2] * 77 + [0] * 77, [0] * 154]
    assert whole.lengths.tolist() == [77, 154]
    alone = joined([single])
    assert alone.bias.tolist() == [[log2] * 77]
    assert alone.lengths.tolist() == [77]


def test_one_text_for_a_batch() -> None:
    one = joined(repeated(text(1), text(3)))
    row = TextEmbeddings(*(part[:1] for part in one)).expand(4)
    assert [tuple(part.shape) for part in row] == [(4, 231, 4), (4, 1, 3), (4, 231), (4,)]


@pytest.mark.parametrize(
    ("chunks", "times"),
    [
        ((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 4), (4, 1)), ((2, 3), (3, 2)), ((3, 4), (4, 3)), ((6, 4), (2, 3)),
        ((1, 5), (1, 1)), ((4, 5), (1, 1)), ((6, 1), (1, 1)),
    ],
)  # fmt: skip
def test_what_comfyui_repeats(chunks: tuple[int, int], times: tuple[int, int]) -> None:
    texts = [text(number) for number in chunks]
    for before, after, number in zip(texts, repeated(*texts), times, strict=True):
        assert after.tokens is before.tokens
        if number == 1:
            assert after.bias is None
        else:
            torch.testing.assert_close(after.bias, torch.full(after.tokens.shape[:2], math.log(number)))
