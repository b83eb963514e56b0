"""Text: prompts become embeddings, which condition Stages B and C.

One tokenizer and one text encoder serve both stages. Stage C sees every token's hidden state and the pooled projection;
Stage B sees the pooled projection only.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

# (function, *tensors) -> what the function returns.
Run = Callable[..., Any]

logger = logging.getLogger(__name__)

# Characters of the part that was cut from a prompt, in the log.
MOST_QUOTED = 200


class TextEmbeddings(NamedTuple):
    """The text encoder's output for B prompts, in its own dtype and on its device.

    Attributes:
        tokens: (B, 77, D), the last layer's hidden states, before the final layer norm.
        pooled: (B, 1, D), the projection of the end-of-text token.
    """

    tokens: Tensor
    pooled: Tensor


def directly(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a function as it is."""
    return function(*tensors)


class TextEncoder:
    """Encodes prompts.

    Args:
        tokenizer: CLIP's; ``model_max_length`` (77) tokens a prompt, begin and end of text included.
        encoder: CLIP ViT-bigG/14's text tower in the published model.
        log_prompts: whether the warning about a prompt that was cut quotes the part that was cut.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, encoder: CLIPTextModelWithProjection, *, log_prompts: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.log_prompts = log_prompts

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], run: Run = directly) -> TextEmbeddings:
        """Encode prompts. The empty prompt is encoded like any other: guidance uses it as the absence of a prompt.

        The attention mask is passed on. It changes only the padding's hidden states, but Stage C was trained on all 77.

        Args:
            prompts: B texts. What exceeds 77 tokens is cut, with a warning that quotes at most 200 characters of it.
            run: runs the network.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a sequence of texts, but is the text {prompts!r}.")
        prompts = list(prompts)
        batch = self.tokenizer.pad(
            {"input_ids": self._tokenize(prompts)},
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        )
        device = self.encoder.device
        tensors = batch.input_ids.to(device), batch.attention_mask.to(device)
        return TextEmbeddings(*run(self._encode, *tensors))

    def _encode(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[-1], output.text_embeds.unsqueeze(1)

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        """At most 77 tokens each. Warns of what is cut."""
        limit = self.tokenizer.model_max_length
        # verbose=False: the tokenizer's own warning of the length says neither which prompt nor what is lost.
        batch = self.tokenizer(prompts, return_offsets_mapping=True, verbose=False)
        kept = []
        for prompt, ids, places in zip(prompts, batch.input_ids, batch.offset_mapping, strict=True):
            if len(ids) > limit:
                # The last token kept is the end of text, so the prompt's own words end one earlier.
                dropped = prompt[places[limit - 1][0] :].strip()
                if self.log_prompts:
                    quoted = dropped[:MOST_QUOTED] + ("..." if len(dropped) > MOST_QUOTED else "")
                    logger.warning("The prompt exceeds %d tokens; this end of it was left out: %r", limit, quoted)
                else:
                    logger.warning("The prompt exceeds %d tokens; %d were left out.", limit, len(ids) - limit)
                ids = [*ids[: limit - 1], ids[-1]]
            kept.append(ids)
        return kept
