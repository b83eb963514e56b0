"""The captions of a dataset, and their tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CLIPTokenizer

from training.dataset import Dataset
from training.workshop import load_component

MODEL = Path(__file__).parent.parent.parent / "weights" / "mini"


class Plain(Dataset):
    """Black pictures."""

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return torch.zeros(len(indices), 3, *(size or self.size))


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return load_component(MODEL, "tokenizer")


def dataset(captions: object, tokenizer: CLIPTokenizer) -> Plain:
    return Plain(captions, tokenizer, (8, 8), torch.device("cpu"))


PIECES = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *(" ", "  ", "\n", "\t ", "\u00a0", "\u2003", "\x1c", " \u0301", "e \u0301", "\u00a8"),
            *(
                "a picture of an apple",
                "it's",
                "'s",
                "<|endoftext|>",
                "<|startoftext|>",
                "<|endoftext|> a",
                "\u03a3\u03a3 \u03a3",
            ),
        ]
    ),
)


@given(texts=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=1, max_size=5))
def test_tokens_are_the_tokenizers_own(texts: list[str], tokenizer: CLIPTokenizer) -> None:
    """Although captions are tokenised word by word."""
    texts = [*texts, "", "an apple " * 60]  # more than 77 tokens
    whole = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    ids, mask = dataset([""], tokenizer).tokenise(texts)
    assert (ids.dtype, mask.dtype) == (torch.int32, torch.int8)
    assert np.array_equal(ids, whole["input_ids"])
    assert np.array_equal(mask, whole["attention_mask"])


def test_captions_are_written_when_they_are_needed(tokenizer: CLIPTokenizer) -> None:
    written = []

    def write() -> list[str]:
        written.append("once")
        return ["an apple", ""]

    lazy = dataset(write, tokenizer)
    lazy.images(torch.arange(2))
    lazy.empty(2)
    assert not written
    eager = dataset(["an apple", ""], tokenizer)
    for _ in range(2):
        for one, two in zip(lazy.tokens(torch.arange(2)), eager.tokens(torch.arange(2)), strict=True):
            assert torch.equal(one, two)
    assert lazy.captions == eager.captions
    assert written == ["once"]
