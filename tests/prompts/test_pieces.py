"""Embeddings that prompts name, and where texts are cut."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cascade.limits import InputError
from cascade.prompts.chunks import Special, chunks
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.parsing import parse, whole
from cascade.prompts.pieces import Piece, Token, pieces
from cascade.prompts.reading import read
from tests.prompts import comfyui

SPECIAL = Special(1000, 1001, 1002, 77)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    folder = tmp_path_factory.mktemp("embeddings")
    for number, name in enumerate(("one", "a,b", "sub/inner"), 1):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({"clip_g": torch.full((number, 4), float(number))}, folder / f"{name}.safetensors")
    return Embeddings(4, folder)


def shown(prompt: str, embeddings: Embeddings, *, weighting: bool) -> list[list[str]]:
    """The words of each piece; of a vector its number in angle brackets."""
    parts = parse(prompt) if weighting else whole(prompt)
    tokenizer = comfyui.tokenizer()
    return [
        [
            f"<{token.vector[0]:.0f}>" if token.vector is not None else tokenizer.convert_ids_to_tokens(token.id)
            for token in piece.tokens
        ]
        for piece in pieces(parts, tokenizer, embeddings, strict=weighting)
    ]


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("embedding:one", [["<1>"]]),
        ("a embedding:one, red", [["a</w>"], ["<1>"], [",</w>", "red</w>"]]),
        ("a embedding:a,b red", [["a</w>"], ["<2>", "<2>"], ["red</w>"]]),
        ("embedding:,one, red", [["<1>"], [",</w>", "red</w>"]]),
        ("a\nembedding:inner embedding:sub/inner", [["a</w>"], ["<3>"] * 3, ["<3>"] * 3]),
        ("embedding: one", [["<1>"]]),
        ("a,embedding:one", [["a</w>", ",</w>", "embed", "ding</w>", ":</w>", "one</w>"]]),
        ("a\tembedding:one", [["a</w>", "embed", "ding</w>", ":</w>", "one</w>"]]),
    ],
)
def test_names_of_embeddings(prompt: str, expected: list[list[str]], weighting: bool, embeddings: Embeddings) -> None:
    assert shown(prompt, embeddings, weighting=weighting) == expected


@pytest.mark.parametrize("name", ["red", "One", "../one", "sub/../one", "", "sub", "/one"])
def test_without_weighting_other_names_are_text(name: str, embeddings: Embeddings) -> None:
    """In one piece: tokens are what they are without embeddings."""
    prompt = f"a embedding:{name} red"
    (piece,) = pieces(whole(prompt), comfyui.tokenizer(), embeddings, strict=False)
    ids = comfyui.tokenizer()(prompt, add_special_tokens=False).input_ids
    assert [token.id for token in piece.tokens] == ids


@pytest.mark.parametrize("name", ["red", "One", "../one", "one,red", ""])
def test_with_weighting_a_missing_name_fails(name: str, embeddings: Embeddings) -> None:
    with pytest.raises(InputError) as error:
        read(f"a embedding:{name} red", comfyui.tokenizer(), embeddings, weighting=True)
    wanted = name or "red"  # the name begins after white space
    assert str(error.value) == (
        f"prompt names the embedding {wanted!r}, which this model does not have: it has a,b, one, sub/inner."
    )


def test_a_model_without_embeddings() -> None:
    for folder in (None, Path("no such folder")):
        with pytest.raises(InputError, match=r"does not have: it has none\."):
            read("embedding:one", comfyui.tokenizer(), Embeddings(4, folder), weighting=True)


@settings(max_examples=settings.default.max_examples // 2)
@given(st.text(max_size=60))
def test_tokens_say_where_they_begin(prompt: str) -> None:
    """In order, and so that the rest of the prompt, from there on, has the rest of the tokens."""
    for parts in (parse(prompt), whole(prompt)):
        made = pieces(parts, comfyui.tokenizer(), Embeddings(4), strict=False)
        places = [token.place for piece in made for token in piece.tokens]
        assert places == sorted(places)
        assert all(0 <= place < len(prompt) for place in places)


sizes = st.lists(st.integers(1, 200) | st.integers(1, 12), max_size=12)


@given(sizes)
def test_chunks(sizes: list[int]) -> None:
    numbers = itertools.count()
    made = [Piece([Token(next(numbers), None, 0) for _ in range(size)], float(i)) for i, size in enumerate(sizes)]
    cut = chunks(made)
    # All tokens, once, in their order, each with its piece's weight.
    assert [token.id for chunk in cut for token in chunk.tokens] == list(range(sum(sizes)))
    assert [weight for chunk in cut for weight in chunk.weights] == [
        float(i) for i, size in enumerate(sizes) for _ in range(size)
    ]
    assert all(len(chunk.tokens) <= 75 for chunk in cut)
    assert all(chunk.tokens for chunk in cut[1:])
    for before, after in itertools.pairwise(cut):
        first = after.weights[0]
        assert len(before.tokens) == 75 or (sizes[int(first)] < 8 and before.weights[-1] != first)
    for piece, size in enumerate(sizes):
        if size < 8:
            assert sum(float(piece) in chunk.weights for chunk in cut) == 1


@given(sizes)
def test_what_the_text_encoder_is_given(sizes: list[int]) -> None:
    for chunk in chunks([Piece([Token(7, None, 0)] * size, 0.5) for size in sizes]):
        ids, weights, count = chunk.ids(SPECIAL), chunk.all_weights(SPECIAL), len(chunk.tokens)
        assert ids == [1000, *[7] * count, 1001, *[1002] * (75 - count)]
        assert weights == [1, *[0.5] * count, *[1] * (76 - count)]
        for ends_early in (False, True):
            assert chunk.mask(SPECIAL, ends_early=ends_early) == [1] * (count + 2) + [0] * (75 - count)


def test_an_end_of_text_that_is_spelled_out() -> None:
    tokens = [Token(7, None, 0), Token(SPECIAL.end, None, 0), Token(7, None, 0), Token(0, torch.ones(4), 0)]
    (chunk,) = chunks([Piece(tokens, 1.0)])
    assert chunk.mask(SPECIAL, ends_early=False)[:7] == [1, 1, 1, 1, 1, 1, 0]
    assert chunk.mask(SPECIAL, ends_early=True)[:7] == [1, 1, 1, 0, 1, 0, 0]
