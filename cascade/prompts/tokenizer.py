"""CLIP's tokenizer, in transformers' files, on the library tokenizers.

It makes the tokens of transformers' `CLIPTokenizer`, which takes seconds to import.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

WHOLE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
SETTINGS = "tokenizer_config.json"
# Folders of older versions, whose settings do not list the added tokens, have special and added tokens here.
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
LISTED = "added_tokens_decoder"
LONGEST, SHORTEST = 77, 3  # a chunk has a begin, an end, and a token between
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# Options of the library's model, by name, as CLIP has them. A file may have others.
MODEL = {
    "dropout": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": WORD_END,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
# A special token, an English ending, letters, one digit, or other signs.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Turns texts into tokens. Use `from_pretrained`.

    Args:
        tokenizer: with CLIP's vocabulary and merges. Everything else of it is replaced by CLIP's.
        settings: of `SETTINGS`, `SPECIAL` and `ADDED`.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: begin and end of text, and padding.
        model_max_length: tokens of a chunk, begin and end of text included.

    Raises:
        ValueError: the tokenizer is of another kind, its vocabulary lacks a special token, or a setting has a value that is not
            allowed.
    """

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
        if not isinstance(tokenizer.model, BPE):
            raise ValueError(f"its model is {type(tokenizer.model).__name__}; CLIP's is BPE")
        self._tokenizer, self._settings = tokenizer, settings
        names = {"bos": BEGIN, "eos": END, "pad": END, "unk": END}
        names = {kind: _special(settings, kind, default) for kind, default in names.items()}
        added = sorted((settings.get(LISTED) or {}).items(), key=lambda item: int(item[0]))
        tokenizer.add_tokens([_added(token) for _, token in added])
        vocabulary = tokenizer.get_vocab()
        for kind, name in names.items():
            if name not in vocabulary:
                raise ValueError(f"the vocabulary lacks the {kind}_token {name}")
        for option, value in MODEL.items():
            setattr(tokenizer.model, option, value)
        tokenizer.model.unk_token = names["unk"]
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            vocabulary[names[kind]] for kind in ("bos", "eos", "pad")
        )
        self.model_max_length = _length(settings)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.post_processor = processors.RobertaProcessing(
            (names["eos"], self.eos_token_id),
            (names["bos"], self.bos_token_id),
            trim_offsets=False,
            add_prefix_space=False,
        )

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Read `WHOLE`, or `VOCABULARY` and `MERGES`, from a folder.

        Raises:
            Exception: a file is missing or damaged; the library has no narrower type.
            PanicException: the same, where the library's Rust code panics; a BaseException, but no Exception.
        """
        folder = Path(folder)
        settings = _read(folder / SETTINGS)
        if LISTED not in settings:
            settings |= _read(folder / SPECIAL)
            if added := _read(folder / ADDED):
                settings[LISTED] = {place: {"content": token} for token, place in added.items()}
        if (folder / WHOLE).is_file():
            return cls(Tokenizer.from_file(str(folder / WHOLE)), settings)
        return cls(Tokenizer(BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES))), settings)

    def __call__(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = True,
        verbose: bool = False,
    ) -> dict[str, list[list[Any]]]:
        """The tokens of texts, of any number.

        Args:
            texts: a list.
            add_special_tokens: whether begin and end of text are added.
            return_offsets_mapping, verbose: ignored; transformers' tokenizer returns offsets only if asked, and warns of long
                texts.

        Returns:
            For each text "input_ids", and as "offset_mapping" for each of them where it begins and ends in the text.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of texts, but is the text {texts!r}.")
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded], "offset_mapping": [one.offsets for one in encoded]}

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens."""
        return self._tokenizer.get_vocab()

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `WHOLE` and `SETTINGS` into a folder, which is made. transformers reads it, too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(folder, WHOLE)))
        settings = {**self._settings, "tokenizer_class": "CLIPTokenizer"}
        Path(folder, SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is not a JSON object")
    return content


def _special(settings: Mapping[str, Any], kind: str, default: str) -> str:
    """The text of a special token: "bos", "eos", "pad" or "unk"."""
    token = settings.get(f"{kind}_token") or default
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"{kind}_token is {token!r}; it must be a text, or an object with the text content")
    return content


def _length(settings: Mapping[str, Any]) -> int:
    """Tokens of a chunk. Files without a limit have a number of thirty digits."""
    length = settings.get("model_max_length") or LONGEST
    if isinstance(length, int | float) and length >= 2**31:
        return LONGEST
    if type(length) is not int or length < SHORTEST:
        raise ValueError(f"model_max_length is {length!r}; it must be a whole number, at least {SHORTEST}")
    return length


def _added(token: dict[str, Any]) -> AddedToken:
    named = {
        name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
    }
    return AddedToken(token["content"], **named)
