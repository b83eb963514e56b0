"""Encoded texts, and how texts of unlike lengths share a batch.

Stage C attends to its own latents, the text, the pooled text and the image prompts in one softmax. So the share of the text
grows with its length, padding included, and a text must be neither repeated nor filled up to change nothing. Texts of one
length need nothing. Otherwise the shorter ones are filled up, and `TextEmbeddings.bias`, added to the logits of their keys, is
-inf where they end: a picture then depends on its own two texts only, each at its own length.
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
    """What the text encoder says about B prompts, in its own dtype and on its device.

    Attributes:
        tokens: (B, 77 N, D) of N chunks: the last layer's hidden states, before the final layer norm, weighted.
        pooled: (B, 1, D), the projection of the first chunk's end-of-text token.
        bias: float32 (B, 77 N), what is added to the logits of the tokens in Stage C's attention: -inf where a shorter text has
            ended, ln k where the text counts k times. None: zeros.
    """

    tokens: Tensor
    pooled: Tensor
    bias: Tensor | None = None

    def expand(self, batch: int) -> "TextEmbeddings":
        """Of one prompt: the same for each of a batch, in the same memory."""
        bias = None if self.bias is None else self.bias.expand(batch, -1)
        return TextEmbeddings(self.tokens.expand(batch, -1, -1), self.pooled.expand(batch, -1, -1), bias)


def joined(texts: Sequence[TextEmbeddings]) -> TextEmbeddings:
    """One batch of several. Shorter texts are filled up with zeros, to which nothing attends."""
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
