"""Pieces of a prompt -> chunks of 77 tokens, begin and end of text included: what CLIP's text encoder takes at once.

The chunks are ComfyUI's (comfy/sd1_clip.py, `tokenize_with_weights`): a piece of fewer than 8 tokens that does not fit into
the rest of a chunk begins the next chunk; longer pieces are cut at the end of the chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cascade.prompts.pieces import Piece, Token

# Pieces of at least this many tokens are cut.
LARGE = 8


class Special(NamedTuple):
    """The ids of the tokens for begin and end of text and for padding; the length of a chunk, 77."""

    begin: int
    end: int
    padding: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """Up to 75 tokens of a prompt with their weights, without begin and end of text."""

    tokens: tuple[Token, ...]
    weights: tuple[float, ...]

    def ids(self, special: Special) -> list[int]:
        """All 77 ids, with 0 in the place of each vector."""
        padding = special.length - len(self.tokens) - 2
        return [special.begin, *(token.id for token in self.tokens), special.end, *[special.padding] * padding]

    def all_weights(self, special: Special) -> list[float]:
        """The weights of all 77. Begin and end of text and the padding have 1."""
        return [1.0, *self.weights, *[1.0] * (special.length - len(self.weights) - 1)]

    def mask(self, special: Special, *, ends_early: bool) -> list[int]:
        """What the text encoder attends to: 1 up to the end of text, 0 for the padding.

        Args:
            ends_early: whether an end of text that the prompt itself spells out, `<|endoftext|>`, is the end. ComfyUI masks
                everything after it except vectors. transformers' tokenizer, which the authors use, does not.
        """
        mask = [1] * (len(self.tokens) + 2) + [0] * (special.length - len(self.tokens) - 2)
        spelled = [place for place, token in enumerate(self.tokens) if token.id == special.end and token.vector is None]
        if ends_early and spelled:
            for place, token in enumerate(self.tokens[spelled[0] + 1 :], spelled[0] + 2):
                mask[place] = int(token.vector is not None)
            mask[len(self.tokens) + 1] = 0
        return mask

    def without_each_weight(self) -> list[tuple[float, "Chunk"]]:
        """For each weight other than 1: the weight, and the chunk without the tokens that have it."""
        found = []
        for weight in sorted(set(self.weights) - {1.0}):
            kept = [i for i, other in enumerate(self.weights) if other != weight]
            rest = Chunk(tuple(self.tokens[i] for i in kept), tuple(self.weights[i] for i in kept))
            found.append((weight, rest))
        return found


def chunks(pieces: Sequence[Piece], capacity: int = 75) -> list[Chunk]:
    """The chunks of a prompt: at least one, and as many as it needs.

    Args:
        capacity: tokens of a chunk beside begin and end of text.
    """
    filled: list[list[tuple[Token, float]]] = [[]]
    for piece in pieces:
        left = [(token, piece.weight) for token in piece.tokens]
        while len(filled[-1]) + len(left) > capacity:
            if len(piece.tokens) >= LARGE:
                room = capacity - len(filled[-1])
                filled[-1].extend(left[:room])
                left = left[room:]
            filled.append([])
        filled[-1].extend(left)
    return [Chunk(tuple(token for token, _ in one), tuple(weight for _, weight in one)) for one in filled]
