"""Trains a CLIP tokenizer on captions."""

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

SMALLEST_VOCABULARY = 2 * 256 + 2
"""Two symbols for each byte (inside and at the end of a word), and two special tokens."""
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> CLIPTokenizer:
    """Learns byte-pair merges in CLIP's form.

    Args:
        captions: the text to learn from.
        vocabulary: upper bound on the number of tokens, including 512 byte symbols and two special tokens.

    Returns:
        A tokenizer with at most 77 tokens a text, padded with ``<|endoftext|>``. The last two ids are the start and end tokens,
        as in the published tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    # As special tokens, letters have fixed ids. Otherwise those at a word's end get theirs in a hash map's order, which differs
    # from run to run, and decides between pairs that occur equally often.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, end_of_word_suffix="</w>", special_tokens=letters, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = [*letters, *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in merges], model_max_length=77)
