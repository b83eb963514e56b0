"""Encodes captions, with new words that are being learned, exactly as prompts are encoded later."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.loras.words import Words
from cascade.networks.clip import TextTower
from cascade.prompts.encoding import encoder_of
from cascade.prompts.reading import special_of
from cascade.prompts.text import TextEmbeddings
from cascade.prompts.tokenizer import ClipTokenizer
from cascade.stages.text import TextEncoder
from training.errors import TrainingError


def first_vectors(phrase: str, count: int, tokenizer: ClipTokenizer, encoder: TextTower) -> Tensor:
    """The initial vectors of a new word: float32 (count, D).

    If the phrase has `count` tokens, one vector each; otherwise all are their mean, as in the authors' training.

    Raises:
        TrainingError: the phrase has no token.
    """
    ids = tokenizer([phrase], add_special_tokens=False)["input_ids"][0]
    if not ids:
        raise TrainingError(f"[lora] begins_from is {phrase!r}, which has no word that the tokenizer knows.")
    rows = encoder.get_input_embeddings().weight[torch.tensor(ids, device=encoder.device)].detach().float()
    return (rows if len(ids) == count else rows.mean(0, keepdim=True).expand(count, -1)).clone()


class Captions:
    """Texts, tokenised once. They are cut after 75 tokens.

    Args:
        texts: the captions.
        tokenizer, encoder: CLIP's.
        word, vectors: a new word and how many tokens it has; "": there is none.

    Attributes:
        cut: how many texts were too long.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: ClipTokenizer,
        encoder: TextTower,
        word: str = "",
        vectors: int = 1,
    ) -> None:
        self.encoder = encoder
        width = encoder.config.hidden_size
        # Each vector holds its own number, from 1 on, so that its places can be found.
        numbers = torch.arange(1, vectors + 1, dtype=torch.float32)[:, None].expand(-1, width)
        words = Words({word: numbers} if word else {})
        reader = TextEncoder(tokenizer, encoder)
        special = special_of(tokenizer)
        chunks = [reader.read(words.spelled(text), words=words.vectors) for text in texts]
        self.cut = sum(len(one) > 1 for one in chunks)
        first = [one[0] for one in chunks]
        device = encoder.device
        self.ids = torch.tensor([one.ids(special) for one in first], device=device)
        self.mask = torch.tensor([one.mask(special, ends_early=False) for one in first], device=device)
        # Which of the word's vectors stands at a place, from 1 on; 0: an ordinary token.
        self.places = torch.zeros_like(self.ids)
        for row, chunk in enumerate(first):
            for place, token in enumerate(chunk.tokens, 1):
                if token.vector is not None:
                    self.places[row, place] = int(token.vector[0])

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, rows: Tensor, vectors: Tensor | None = None) -> TextEmbeddings:
        """The embeddings of the texts ``rows`` (B,), with gradients where the encoder or the vectors have them.

        vectors: of the new word, float32 (n, D).
        """
        more = []
        if vectors is not None:
            places = self.places[rows]
            zeros = vectors.new_zeros(1, vectors.shape[1])
            chosen = torch.cat([zeros, vectors])[places].to(self.encoder.dtype)
            more = [chosen, (places > 0).unsqueeze(-1)]
        return TextEmbeddings(*encoder_of(self.encoder)(self.ids[rows], self.mask[rows], *more))
