"""A prompt -> its chunks: all steps before the text encoder."""

from pathlib import Path

from cascade.prompts.chunks import Chunk, Special, chunks
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.parsing import check_weights, parse, whole
from cascade.prompts.pieces import files, pieces
from cascade.prompts.tokenizer import ClipTokenizer


def special_of(tokenizer: ClipTokenizer) -> Special:
    """A tokenizer's ids for begin and end of text and for padding, and the length of its chunks."""
    return Special(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length)


def read(
    prompt: str, tokenizer: ClipTokenizer, embeddings: Embeddings, *, weighting: bool, name: str = "prompt"
) -> list[Chunk]:
    """The chunks of a prompt.

    Args:
        weighting: whether brackets are weights, see `parsing`, and a name that no embedding has is an error. Otherwise
            brackets are text, and so is `embedding:NAME` where no embedding has the name.
        name: of the input, for errors.

    Raises:
        InputError: a weight lies outside of -4 to 4, or an embedding is missing or cannot be used.
    """
    if weighting:
        check_weights(name, prompt)
    parts = parse(prompt) if weighting else whole(prompt)
    found = pieces(parts, tokenizer, embeddings, strict=weighting, name=name)
    return chunks(found, tokenizer.model_max_length - 2)


def embedding_files(prompt: str, embeddings: Embeddings, *, weighting: bool) -> dict[str, Path]:
    """The files of the embeddings that a prompt names, by the names that it has for them. Reads none."""
    return files(parse(prompt) if weighting else whole(prompt), embeddings)
