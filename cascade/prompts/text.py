"""Encoded texts, and batches of texts of different lengths.

Stage C attends to its own latents, the text, the pooled text and the image prompts in one softmax. So the text's share of
attention grows with its length, padding included: repeating or padding a text would change the picture. In a batch of
different lengths, the shorter texts are padded, and attention leaves out what follows `TextEmbeddings.lengths`. So a picture
depends only on its own two texts, each at its own length.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# ComfyUI runs texts one after the other if one of them would have to be repeated more often (comfy/conds.py).
MOST_REPEATED = 4


class TextEmbeddings(NamedTuple):
    """The text encoder's results for B prompts, in its own dtype and on its device.

    Attributes:
        tokens: (B, 77 N, D) of N chunks: the last layer's hidden states, before the final layer norm, weighted.
        pooled: (B, 1, D), the projection of the first chunk's end-of-text token.
        bias: float32 (B, 77 N), added to the logits of the tokens in Stage C's attention: ln k where the text counts k times.
            None: zeros.
        lengths: int32 (B,), tokens of each text; what follows is padding. None: no text is padded.
    """

    tokens: Tensor
    pooled: Tensor
    bias: Tensor | None = None
    lengths: Tensor | None = None

    def expand(self, batch: int) -> "TextEmbeddings":
        """Repeat one prompt's embeddings for a batch, without a copy."""
        return TextEmbeddings(
            self.tokens.expand(batch, -1, -1),
            self.pooled.expand(batch, -1, -1),
            None if self.bias is None else self.bias.expand(batch, -1),
            None if self.lengths is None else self.lengths.expand(batch),
        )


def joined(texts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Join several into one batch. Shorter texts are padded with zeros, which attention leaves out."""
    length = max(text.tokens.shape[1] for text in texts)
    missing = [length - text.tokens.shape[1] for text in texts]
    bias = lengths = None
    if any(text.bias is not None for text in texts):
        bias = torch.cat([F.pad(_bias(text), (0, more)) for text, more in zip(texts, missing, strict=True)])
    # With a bias, too: then Stage C has two kinds of attention besides the plain one instead of three.
    if any(missing) or bias is not None or any(text.lengths is not None for text in texts):
        lengths = torch.cat([_lengths(text) for text in texts])
    tokens = [F.pad(text.tokens, (0, 0, 0, more)) for text, more in zip(texts, missing, strict=True)]
    return TextEmbeddings(torch.cat(tokens), torch.cat([text.pooled for text in texts]), bias, lengths)


def _bias(text: TextEmbeddings) -> Tensor:
    """Float32 (B, 77 N), zeros without a bias."""
    return text.tokens.new_zeros(text.tokens.shape[:2], dtype=torch.float32) if text.bias is None else text.bias


def _lengths(text: TextEmbeddings) -> Tensor:
    """Int32 (B,), also of a text without padding."""
    batch, length, _ = text.tokens.shape
    return text.tokens.new_full((batch,), length, dtype=torch.int32) if text.lengths is None else text.lengths


def repeated(text: TextEmbeddings, negative: TextEmbeddings) -> tuple[TextEmbeddings, TextEmbeddings]:
    """A prompt and its negative prompt, counted as ComfyUI counts them.

    ComfyUI runs both in one batch if the least common multiple of their lengths is at most 4 times the shorter one, and repeats
    each as a whole until it is that long (comfy/conds.py, `CONDCrossAttn`). k times the same keys and values in a softmax are the
    same as ln k on the logits of one.
    """
    lengths = [one.tokens.shape[1] for one in (text, negative)]
    common = math.lcm(*lengths)
    if common > MOST_REPEATED * min(lengths):
        return text, negative
    return _counted(text, common // lengths[0]), _counted(negative, common // lengths[1])


def _counted(text: TextEmbeddings, times: int) -> TextEmbeddings:
    if times == 1:
        return text
    bias = torch.full(text.tokens.shape[:2], math.log(times), dtype=torch.float32, device=text.tokens.device)
    return text._replace(bias=bias)
