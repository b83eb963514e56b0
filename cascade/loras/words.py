"""Learned words in prompts.

Where a prompt has the name of a word, the text encoder gets its vectors. Upper and lower case do not matter, as in CLIP's
tokenizer. A name that begins or ends in a letter or digit is not found inside other words.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

logger = logging.getLogger(__name__)


class Words:
    """Words by name.

    Args:
        vectors: float32 (n, D) of each.
    """

    def __init__(self, vectors: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        self.names = tuple(vectors)
        # By keys without white space, because the names of embeddings in prompts must not contain any.
        self.vectors = {re.sub(r"\s", "_", name): tensor for name, tensor in vectors.items()}
        longest_first = sorted(vectors, key=len, reverse=True)
        # One key per group of the expression. A group may find another spelling: it takes \u017f for an s, and lower()
        # does not.
        self._keys = [re.sub(r"\s", "_", name) for name in longest_first]
        self._found = re.compile("|".join(f"({_expression(name)})" for name in longest_first), re.IGNORECASE)

    def spelled(self, prompt: str) -> str:
        """A prompt with `embedding:NAME` in place of each word, as `cascade.prompts` reads it."""
        if not self.names:
            return prompt
        return self._found.sub(lambda match: f" embedding:{self._keys[(match.lastindex or 1) - 1]} ", prompt)


def _expression(name: str) -> str:
    before = r"(?<!\w)" if name[0].isalnum() or name[0] == "_" else ""
    after = r"(?!\w)" if name[-1].isalnum() or name[-1] == "_" else ""
    return rf"(?<!embedding:){before}{re.escape(name)}{after}"


def distinct(named: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Words of several adapters by name. Those that share a name get numbers: [word1], [word1]2, ..."""
    found: dict[str, Tensor] = {}
    for name, vectors in named:
        number, own = 1, name
        while own.lower() in {one.lower() for one in found}:
            number += 1
            own = f"{name}{number}"
        if own != name:
            logger.warning("Two LoRAs bring the word %s; the second is called %s.", _shown(name), _shown(own))
        found[own] = vectors
    return found


def _shown(name: str) -> str:
    """A name for the log: one line, without the middle of a long one."""
    line = " ".join(name.split())
    return line if len(line) <= 100 else f"{line[:60]}...{line[-30:]}"
