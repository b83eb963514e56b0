"""Encoded texts, and batches of texts of different lengths.

Stage C attends to its own latents, the text, the pooled text and the image prompts in one softmax. So the text's share of
attention grows with its length, padding included: repeating or padding a text would change the picture. In a batch of
different lengths, the shorter texts are padded, and `TextEmbeddings.bias`, which is added to the logits of the keys, is -inf
for this padding. So a picture depends only on its own two texts, each at its own length.
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
        bias: float32 (B, 77 N), added to the logits of the tokens in Stage C's attention: -inf where a shorter text has
            ended, ln k where the text counts k times. None: zeros.
    """

    tokens: Tensor
    pooled: Tensor
    bias: Tensor | None = None

    def expand(self, batch: int) -> "TextEmbeddings":
        """Repeat one prompt's embeddings for a batch, without a copy."""
        bias = None if self.bias is None else self.bias.expand(batch, -1)
        return TextEmbeddings(self.tokens.expand(batch, -1, -1), self.pooled.expand(batch, -1, -1), bias)


def joined(texts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """Join several into one batch. Shorter texts are padded with zeros, which attention masks out."""
    length = max(text.tokens.shape[1] for text in texts)
    pooled = torch.cat([text.pooled for text in texts])
    if all(text.tokens.shape[1] == length and text.bias is None for text in texts):
        return TextEmbeddings(torch.cat([text.tokens for text in texts]), pooled)
    tokens, biases = [], []
    for text in texts:
        missing = length - text.tokens.shape[1]
        bias = text.bias
        if bias is None:
            bias = torch.zeros(text.tokens.shape[:2], dtype=torch.float32, device=text.tokens.device)
        tokens.append(F.pad(text.tokens, (0, 0, 0, missing)))
        biases.append(F.pad(bias, (0, missing), value=-math.inf))
    return TextEmbeddings(torch.cat(tokens), pooled, torch.cat(biases))


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
