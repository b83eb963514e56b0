"""Whether the tokenizer and the image processor of a model make what its text and image encoders read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.weights.errors import WeightsError, shortened


def check_processors(parts: Mapping[str, Any], root: Path) -> None:
    """Make sure that the processors among loaded components fit the towers. A token without a vector would end a GPU's process.

    Args:
        parts: components by name.
        root: the model folder, for errors.

    Raises:
        WeightsError: they do not.
    """
    _check_tokens(parts["tokenizer"], parts["text_encoder"].config, root)
    if "feature_extractor" in parts and "image_encoder" in parts:
        _check_images(parts["feature_extractor"], parts["image_encoder"].config, root)


def _check_tokens(tokenizer: Any, config: Any, root: Path) -> None:
    length, most = tokenizer.model_max_length, config.max_position_embeddings
    if length > most:
        raise WeightsError(
            f"{root / 'tokenizer'} has a model_max_length of {length}, but {root / 'text_encoder'} takes at most {most} tokens."
        )
    token, place = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if place >= config.vocab_size:
        raise WeightsError(
            f"{root / 'tokenizer'} has the token {shortened(repr(token), 50)} with the id {place}, but {root / 'text_encoder'} "
            f"has {config.vocab_size} tokens, its vocab_size."
        )


def _check_images(processor: Any, config: Any, root: Path) -> None:
    height, width = processor.crop
    side = config.image_size
    if (height, width) != (side, side):
        raise WeightsError(
            f"{root / 'feature_extractor'} makes images of {width}x{height} pixels, but {root / 'image_encoder'} reads "
            f"{side}x{side}."
        )
