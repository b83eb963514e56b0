"""Text: prompts become embeddings, which condition Stages B and C.

One tokenizer and one text encoder serve both stages. Stage C sees every token's hidden state and the pooled projection;
Stage B sees the pooled projection only. What a prompt's brackets and names mean is in `cascade.prompts`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cascade.networks.clip import TextTower
from cascade.prompts.chunks import Chunk
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.encoding import encode, encoder_of
from cascade.prompts.reading import read, special_of
from cascade.prompts.text import TextEmbeddings, joined
from cascade.prompts.tokenizer import ClipTokenizer

# (function, *tensors) -> what the function returns.
Run = Callable[..., Any]

logger = logging.getLogger(__name__)

# Characters of the part that was cut from a prompt, in the log.
MOST_QUOTED = 200


def directly(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a function as it is."""
    return function(*tensors)


class TextEncoder:
    """Encodes prompts.

    Args:
        tokenizer: CLIP's; ``model_max_length`` (77) tokens a chunk, begin and end of text included.
        encoder: CLIP ViT-bigG/14's text tower in the published model.
        embeddings: those that prompts may name; None: none.
        log_prompts: whether the warning about a prompt that was cut quotes the part that was cut.
    """

    def __init__(
        self,
        tokenizer: ClipTokenizer,
        encoder: TextTower,
        *,
        embeddings: Embeddings | None = None,
        log_prompts: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.embeddings = embeddings or Embeddings(encoder.config.hidden_size)
        self.log_prompts = log_prompts

    def encode(self, prompts: Sequence[str], run: Run = directly, *, weighting: bool = False) -> TextEmbeddings:
        """Encode prompts of any length as one batch: see `encode_each`, and `prompts.text.joined`."""
        return joined(self.encode_each(prompts, run, weighting=weighting))

    @torch.no_grad()
    def encode_each(
        self,
        prompts: Sequence[str],
        run: Run = directly,
        *,
        weighting: bool = False,
        weight_pooled: bool = False,
        most_chunks: int | None = None,
        words: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[TextEmbeddings]:
        """Encode prompts, each at its own length. The empty prompt is encoded like any other: guidance uses it as the absence
        of a prompt.

        The attention mask is passed on. It changes only the padding's hidden states, but Stage C was trained on all 77.

        Args:
            prompts: texts, at least one.
            run: runs the network.
            weighting, words: see `read`.
            weight_pooled: whether weights act on the pooled embeddings too, see `prompts.encoding.weighted_pooled`.
            most_chunks: of 75 tokens. The rest of a prompt is cut, with a warning that quotes at most 200 characters of it.
                None: no limit.

        Returns:
            For each prompt its embeddings, of one row.

        Raises:
            InputError: see `read`.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of texts, but is the text {prompts!r}.")
        chunks = [self.read(prompt, weighting=weighting, words=words) for prompt in prompts]
        if most_chunks is not None:
            chunks = [self._cut(prompt, of_it, most_chunks) for prompt, of_it in zip(prompts, chunks, strict=True)]
        return encode(
            chunks,
            special_of(self.tokenizer),
            partial(run, encoder_of(self.encoder)),
            self.encoder.device,
            self.encoder.dtype,
            ends_early=weighting,
            weight_pooled=weight_pooled,
        )

    def read(
        self,
        prompt: str,
        *,
        weighting: bool = False,
        words: Mapping[str, Tensor] = MappingProxyType({}),
        name: str = "prompt",
    ) -> list[Chunk]:
        """The chunks of a prompt. Encodes nothing.

        Args:
            weighting: whether brackets are weights and names of embeddings must exist, see `prompts.reading.read`.
            words: vectors by name, which `embedding:NAME` finds before those of `embeddings`: (n, D) or (D,), any dtype.
            name: of the input, for errors.

        Raises:
            InputError: a weight lies outside of -4 to 4, or an embedding is missing or cannot be used.
        """
        return read(prompt, self.tokenizer, self.embeddings.with_words(words), weighting=weighting, name=name)

    def _cut(self, prompt: str, chunks: list[Chunk], most: int) -> list[Chunk]:
        """The first chunks of a prompt. Warns of what is cut."""
        left = [token for chunk in chunks[most:] for token in chunk.tokens]
        if left:
            limit = most * (self.tokenizer.model_max_length - 2)
            if self.log_prompts:
                dropped = prompt[left[0].place :].strip()
                quoted = dropped[:MOST_QUOTED] + ("..." if len(dropped) > MOST_QUOTED else "")
                logger.warning("The prompt exceeds %d tokens; this end of it was left out: %r", limit, quoted)
            else:
                logger.warning("The prompt exceeds %d tokens; %d were left out.", limit, len(left))
        return chunks[:most]
