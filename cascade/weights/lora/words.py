"""Words that adapters bring: the vectors that the text encoder gets in their place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TABLE = "text_model.embeddings.token_embedding.weight"


@dataclass(frozen=True, eq=False)
class Word:
    """A learned word.

    Attributes:
        name: as it stands in a prompt.
        vectors: float32 (n, D), one or several, which take the places of n tokens.
        begins_from: rows of the table of words whose mean is added to the vectors; (): none, so zeros are added; None: the
            vectors are complete.
        outputs: float32 (n, D), added to the text encoder's output for these tokens; None: nothing.
    """

    name: str
    vectors: Tensor
    begins_from: tuple[int, ...] | None = None
    outputs: Tensor | None = None

    def rows(self, table: Tensor) -> Tensor:
        """The rows for this word in the table of words: float32 (n, D).

        table: that of the text encoder, (words, D), of any floating-point dtype.
        """
        if not self.begins_from:
            return self.vectors
        places = torch.tensor(self.begins_from, device=table.device)
        return self.vectors.to(table.device) + table[places].float().mean(0)


def listed(words: Sequence[Word]) -> str:
    """The words' names, for the log."""
    return ", ".join(
        word.name if len(word.vectors) == 1 else f"{word.name} ({len(word.vectors)} tokens)" for word in words
    )
