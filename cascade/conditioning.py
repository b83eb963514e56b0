"""Words and pictures become what Stages B and C are conditioned on.

One tokenizer and one text encoder serve both stages. Stage C sees every token's hidden state and the pooled projection;
Stage B sees the pooled projection only. Pictures go through the CLIP vision tower and condition Stage C. Knows
nothing of guidance, batches of images or where the networks live.
"""

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType

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
from cascade.prompts.chunks import Chunk
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.encoding import encode, encoder_of
from cascade.prompts.reading import read, special_of
from cascade.prompts.text import TextEmbeddings, joined

logger = logging.getLogger(__name__)

# Characters of what was cut from a prompt, in the log.
MOST_QUOTED = 200


class Conditioner:
    """Encodes prompts and, when it is given a vision tower, images.

    Args:
        tokenizer: CLIP's; ``model_max_length`` (77) tokens a chunk, begin and end of text included.
        text_encoder: CLIP ViT-bigG-14's text tower in the published model.
        image_processor, image_encoder: crop, resize and normalisation, and CLIP ViT-L-14's vision tower; both or
            neither.
        embeddings: which prompts may name; None: none.
        log_prompts: whether the warning about a prompt that was cut quotes what was left out.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        image_processor: CLIPImageProcessorPil | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        *,
        embeddings: Embeddings | None = None,
        log_prompts: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.image_processor = image_processor
        self.image_encoder = image_encoder
        self.embeddings = embeddings or Embeddings(text_encoder.config.hidden_size)
        self.log_prompts = log_prompts
        self.recorder = Recorder()

    def encode_text(self, prompts: Sequence[str], *, weighting: bool = False) -> TextEmbeddings:
        """Encode prompts of any length as one batch, see `encode_prompts` and `prompts.text.joined`."""
        return joined(self.encode_prompts(prompts, weighting=weighting))

    @torch.no_grad()
    def encode_prompts(
        self,
        prompts: Sequence[str],
        *,
        weighting: bool = False,
        most_chunks: int | None = None,
        words: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[TextEmbeddings]:
        """Encode prompts, each at its own length. The empty prompt is a prompt like any other: guidance takes it as the
        absence of one.

        The attention mask is passed on: it leaves the words' hidden states as they are, but changes those of the
        padding, and Stage C was trained on all 77.

        Args:
            prompts: texts, at least one.
            weighting: see `read`.
            most_chunks: of 75 tokens of text. What exceeds them is cut, with a warning that quotes at most 200 characters
                of it. None: there is no limit.
            words: see `read`.

        Returns:
            For each prompt its embeddings, of batch 1.

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
            self._run_text_encoder,
            self.text_encoder.device,
            self.text_encoder.dtype,
            ends_early=weighting,
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
            words: vectors by name beside `embeddings`, see `prompts.embeddings.Embeddings`.
            name: of the input, for errors.

        Raises:
            InputError: a weight lies outside of -4 to 4, or an embedding is missing or cannot be used.
        """
        return read(prompt, self.tokenizer, self.embeddings.with_words(words), weighting=weighting, name=name)

    def _run_text_encoder(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        # bigG's 32 layers are 13 ms of launches and 3 ms of work (two prompts, H100).
        return self.recorder.run_once("text", encoder_of(self.text_encoder), *given)

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
