"""Words that adapters bring: what the text encoder sees where they stand in a prompt."""

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
        begins_from: rows of the table of words whose mean is added to the vectors; (): none, that is zeros; None: the vectors
            are whole as they are.
        outputs: float32 (n, D), added to what the text encoder makes of these tokens; None: nothing.
    """

    name: str
    vectors: Tensor
    begins_from: tuple[int, ...] | None = None
    outputs: Tensor | None = None

    def rows(self, table: Tensor) -> Tensor:
        """What stands in the table of words for this one: float32 (n, D).

        table: that of the text encoder, (words, D), of any floating-point dtype.
        """
        if not self.begins_from:
            return self.vectors
        places = torch.tensor(self.begins_from, device=table.device)
        return self.vectors.to(table.device) + table[places].float().mean(0)


def listed(words: Sequence[Word]) -> str:
    """Their names, for the log."""
    return ", ".join(
        word.name if len(word.vectors) == 1 else f"{word.name} ({len(word.vectors)} tokens)" for word in words
    )
