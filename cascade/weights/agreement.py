"""Whether the components of a model fit each other: networks that share a setting, and what its text and image encoders read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.weights.components import PROCESSORS
from cascade.weights.errors import WeightsError, shortened
from cascade.weights.making import empty_network, load_processor

TOWERS = ("text_encoder", "image_encoder")
# Settings that must be equal in two components: (component, setting, other component, its setting).
SHARED = (
    ("prior", "clip_text_in_channels", "text_encoder", "hidden_size"),
    ("prior", "clip_text_pooled_in_channels", "text_encoder", "projection_dim"),
    ("prior", "clip_image_in_channels", "image_encoder", "projection_dim"),
    ("ip_adapter", "feature_dim", "image_encoder", "hidden_size"),
    ("decoder", "clip_text_pooled_in_channels", "text_encoder", "projection_dim"),
    ("decoder", "effnet_in_channels", "prior", "out_channels"),
    ("decoder", "out_channels", "vqgan", "latent_channels"),
)


def check_agreement(configs: Mapping[str, Any], others: Mapping[str, Path], target: Path) -> None:
    """Make sure that new components fit each other and the existing ones.

    Args:
        configs: the configurations of the new networks.
        others: the ``config.json`` files of the existing networks.
        target: the model folder, for the error.

    Raises:
        WeightsError: two components differ in a setting of `SHARED`.
    """
    for first, setting, second, other in SHARED:
        values = []
        for component, name in ((first, setting), (second, other)):
            if component in configs:
                values.append(getattr(configs[component], name))
            elif component in others:
                values.append(getattr(empty_network(component, others[component]).config, name))
        if {first, second} & configs.keys() and len(values) == 2 and values[0] != values[1]:
            raise WeightsError(
                f"In {target}, {first} and {second} would not fit each other: {setting} of {first} is {values[0]}, but "
                f"{other} of {second} is {values[1]}."
            )


def check_processors(parts: Mapping[str, Any], root: Path) -> None:
    """Make sure that the processors among loaded components fit the towers. A token without a vector would end a GPU's process.

    Args:
        parts: components by name.
        root: the model folder, for errors.

    Raises:
        WeightsError: they do not.
    """
    if "tokenizer" in parts and "text_encoder" in parts:
        _check_tokens(parts["tokenizer"], parts["text_encoder"].config, root)
    if "feature_extractor" in parts and "image_encoder" in parts:
        _check_images(parts["feature_extractor"], parts["image_encoder"].config, root)


def check_stored_processors(folder: Path, root: Path) -> None:
    """`check_processors`, of the components in a folder that is to become the model folder `root`. Reads no weights."""
    parts = {name: load_processor(name, folder / name) for name in PROCESSORS if (folder / name).is_dir()}
    files = {name: folder / name / "config.json" for name in TOWERS}
    parts |= {name: empty_network(name, file) for name, file in files.items() if file.is_file()}
    check_processors(parts, root)


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
    # The pooled vector is that of the end of text. 2 stands in old configurations, for the token with the largest id.
    if config.eos_token_id not in (2, tokenizer.eos_token_id):
        raise WeightsError(
            f"{root / 'tokenizer'} ends texts by the token {tokenizer.eos_token_id}, but {root / 'text_encoder'} looks for "
            f"{config.eos_token_id}, its eos_token_id."
        )


def _check_images(processor: Any, config: Any, root: Path) -> None:
    height, width = processor.crop
    side = config.image_size
    if (height, width) != (side, side):
        raise WeightsError(
            f"{root / 'feature_extractor'} makes images of {width}x{height} pixels, but {root / 'image_encoder'} reads "
            f"{side}x{side}."
        )
