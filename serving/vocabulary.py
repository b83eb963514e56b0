"""The words that a model knows, if its folder names them: a small model, trained on few words, cannot draw any other."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = "vocabulary.json"
# A word in texts: letters and digits of any script. "jack-o'-lantern" is three words.
WORD = re.compile(r"[^\W_]+")
# Not words: `embedding:NAME`, and the number of a weight.
NO_WORDS = re.compile(r"(?:^|(?<=\s))embedding:\S+|:\s*-?[\d.]+(?=\s*\))", re.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """What prompts of a model may say.

    Attributes:
        objects: names of what it draws, each of one or more words.
        words: the other words: of places, colours, styles and so on.
    """

    objects: Sequence[str]
    words: Sequence[str]
    _names: frozenset[tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = frozenset(tuple(words_of(name)) for name in (*self.objects, *self.words))
        object.__setattr__(self, "_names", names)

    @classmethod
    def of(cls, folder: Path) -> "Vocabulary | None":
        """That of a model folder: its file `vocabulary.json`, {"objects": [text], "words": [text]}; None without the file.

        Raises:
            ValueError: the file is something else.
        """
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            lists = [read[name] for name in ("objects", "words")]
        except (ValueError, KeyError, TypeError):
            lists = [None]
        if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
            raise ValueError(f"{file} must be a JSON object with the lists of texts objects and words.")
        return cls(*lists)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that are neither `words` nor part of an object's whole name, each once, in their order."""
        return list(dict.fromkeys(self._unknown(words_of(NO_WORDS.sub(" ", prompt)))))

    def _unknown(self, words: list[str]) -> Iterator[str]:
        longest, place = max(map(len, self._names), default=1), 0
        while place < len(words):
            lengths = range(min(longest, len(words) - place), 0, -1)
            known = next((n for n in lengths if tuple(words[place : place + n]) in self._names), 0)
            if not known and not words[place].isdecimal():
                yield words[place]
            place += known or 1


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())
