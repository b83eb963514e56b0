"""Words and pictures become what Stages B and C are conditioned on.

One tokenizer and one text encoder serve both stages. Stage C sees every token's hidden state and the pooled projection;
Stage B sees the pooled projection only. Pictures go through the CLIP vision tower and condition Stage C. Knows
nothing of guidance, batches of images or where the networks live.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from cascade.graphs import Recorder

logger = logging.getLogger(__name__)

# Characters of what was cut from a prompt, in the log.
MOST_QUOTED = 200


class TextEmbeddings(NamedTuple):
    """What the text encoder says about B prompts, in its own dtype and on its device.

    Attributes:
        tokens: (B, 77, D), the last layer's hidden states, before the final layer norm.
        pooled: (B, 1, D), the projection of the end-of-text token.
    """

    tokens: Tensor
    pooled: Tensor


class Conditioner:
    """Encodes prompts and, when it is given a vision tower, images.

    Args:
        tokenizer: CLIP's; ``model_max_length`` (77) tokens a prompt, begin and end of text included.
        text_encoder: CLIP ViT-bigG-14's text tower in the published model.
        image_processor, image_encoder: crop, resize and normalisation, and CLIP ViT-L-14's vision tower; both or
            neither.
        log_prompts: whether the warning about a prompt that was cut quotes what was left out.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        image_processor: CLIPImageProcessorPil | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        *,
        log_prompts: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.image_processor = image_processor
        self.image_encoder = image_encoder
        self.log_prompts = log_prompts
        self.recorder = Recorder()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextEmbeddings:
        """Encode prompts. The empty prompt is a prompt like any other: guidance takes it as the absence of one.

        The attention mask is passed on: it leaves the words' hidden states as they are, but changes those of the
        padding, and Stage C was trained on all 77.

        Args:
            prompts: B texts; what exceeds 77 tokens is cut, with a warning that quotes at most 200 characters of it.
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
        device = self.text_encoder.device
        tensors = batch.input_ids.to(device), batch.attention_mask.to(device)
        # bigG's 32 layers are 13 ms of launches and 3 ms of work (two prompts, H100).
        return TextEmbeddings(*self.recorder.run_once("text", self._encode_tokens, *tensors))

    def _encode_tokens(self, ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.text_encoder(ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[-1], output.text_embeds.unsqueeze(1)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode images of any size and mode.

        Returns:
            (B, 1, D), one token an image, in the vision tower's dtype and on its device. D is 768 in the published
            model.

        Raises:
            ValueError: this model has no image encoder.
        """
        if self.image_encoder is None or self.image_processor is None:
            raise ValueError(
                "This model has no image encoder, which image prompts need; "
                "scripts/download-weights --only --with image-encoder, then scripts/save-weights, add it."
            )
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        pixels = pixels.to(self.image_encoder.device, self.image_encoder.dtype)
        (embeddings,) = self.recorder.run_once("images", self._encode_pixels, pixels)
        return embeddings

    def _encode_pixels(self, pixels: Tensor) -> tuple[Tensor]:
        return (self.image_encoder(pixels).image_embeds.unsqueeze(1),)

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
