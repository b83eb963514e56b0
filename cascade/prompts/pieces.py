"""Parts of a prompt -> tokens, and the vectors of the embeddings that they name as `embedding:NAME`.

`embedding:` is recognised at the beginning and after a space or a line break, and the name ends at white space
(ComfyUI, comfy/sd1_clip.py, `tokenize_with_weights`). Commas at its end are text if there is an embedding of the name
without them.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cascade.limits import InputError, shown
from cascade.prompts.embeddings import EmbeddingError, Embeddings
from cascade.prompts.parsing import Part
from cascade.prompts.tokenizer import ClipTokenizer

# Maximum number of names in an error.
MOST_NAMES = 20

Find = Callable[[str], Tensor | None]

_MARK = re.compile(r"(?:^|[ \n])(embedding:)")


class Token(NamedTuple):
    """A token, or a vector in its place.

    Attributes:
        id: in the vocabulary; 0 for a vector.
        vector: float32 (D,) or None.
        place: the index in the prompt at which it begins.
    """

    id: int
    vector: Tensor | None
    place: int


class Piece(NamedTuple):
    """Tokens of one weight that were made together: of the text in a pair of brackets, or of an embedding."""

    tokens: list[Token]
    weight: float


class _Mark(NamedTuple):
    """Where a part names an embedding: from `start`, the white space before it included; the name is `word`, at `at`."""

    start: int
    place: int
    at: int
    word: str


class _Stretch(NamedTuple):
    """A stretch of a part: text, or an embedding's vectors."""

    part: Part
    start: int
    stop: int
    vectors: Tensor | None = None


def pieces(
    parts: Sequence[Part], tokenizer: ClipTokenizer, embeddings: Embeddings, *, strict: bool, name: str = "prompt"
) -> list[Piece]:
    """The pieces of a prompt, each tokenized separately, without begin and end of text.

    Args:
        strict: whether a name that no embedding has is an error; otherwise it stays text.
        name: of the input, for errors.

    Raises:
        InputError: an embedding is missing (if `strict`), or its file cannot be used.
    """
    find = functools.cache(embeddings.find)  # a prompt may name one often
    stretches = [stretch for part in parts for stretch in _stretches(part, find, embeddings, strict, name)]
    texts = [one.part.text[one.start : one.stop] for one in stretches if one.vectors is None]
    # verbose=False: the tokenizer would warn of more than 77 tokens, which are allowed here.
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    made = tokenizer(texts, **options) if texts else {"input_ids": [], "offset_mapping": []}
    tokenized = iter(zip(made["input_ids"], made["offset_mapping"], strict=True))
    found = []
    for part, start, _, vectors in stretches:
        if vectors is None:
            tokens = [
                Token(id, None, part.places[start + offset]) for id, (offset, _) in zip(*next(tokenized), strict=True)
            ]
        else:
            tokens = [Token(0, vector, part.places[start]) for vector in vectors]
        if tokens:
            found.append(Piece(tokens, part.weight))
    return found


def files(parts: Sequence[Part], embeddings: Embeddings) -> dict[str, Path]:
    """The files of the embeddings that a prompt names, by name. Reads none."""
    found: dict[str, Path] = {}
    for mark in (mark for part in parts for mark in _marks(part.text)):
        for word in (mark.word, mark.word.strip(",")):
            if (file := embeddings.file(word)) is not None:
                found[word] = file
                break
    return found


def _marks(text: str) -> Iterator[_Mark]:
    matches = list(_MARK.finditer(text))
    for match, following in itertools.zip_longest(matches, matches[1:]):
        rest = text[match.end() : following.start() if following else None]
        word = "".join(rest.split(maxsplit=1)[:1])
        yield _Mark(match.start(), match.start(1), match.end() + rest.index(word), word)


def _stretches(part: Part, find: Find, embeddings: Embeddings, strict: bool, name: str) -> Iterator[_Stretch]:
    """Cut a part at the embeddings that it names."""
    text = 0
    for mark in _marks(part.text):
        vectors, used = _find(mark.word, find, name)
        if vectors is not None:
            if text < mark.start:
                yield _Stretch(part, text, mark.start)
            text = mark.at + used
            yield _Stretch(part, mark.place, text, vectors)
        elif strict:
            raise _missing(name, mark.word, embeddings.names())
    if text < len(part.text):
        yield _Stretch(part, text, len(part.text))


def _find(word: str, find: Find, name: str) -> tuple[Tensor | None, int]:
    """The vectors of an embedding, and how many characters of the word are its name: commas at the end may be text."""
    try:
        vectors = find(word)
        if vectors is not None or word == (bare := word.strip(",")):
            return vectors, len(word)
        return find(bare), len(word.rstrip(","))
    except EmbeddingError as error:
        raise InputError(f"{name} names the embedding {shown(word)}, but {error}.") from error


def _missing(name: str, wanted: str, names: Sequence[str]) -> InputError:
    there = f"it has {', '.join(names[:MOST_NAMES])}" if names else "it has none"
    if len(names) > MOST_NAMES:
        there += f" and {len(names) - MOST_NAMES} more"
    return InputError(f"{name} names the embedding {shown(wanted)}, which this model does not have: {there}.")
