"""The words of the captions, for the model folder's `vocabulary.json`: users of the miniature must know them."""

from collections.abc import Sequence

from miniature.captions import LARGE, PLACE_PHRASES, PREFIXES, RELATION_PHRASES, SMALL, STYLE_PHRASES
from miniature.icons import load_objects
from miniature.scenes import COLOUR_NAMES, GRADIENT_WAYS

# Of the patterns in `captions.Captioner`.
GRAMMAR = ("a", "an", "on", "with", "against", "background", "gradient", "to", "from")


def vocabulary(names: Sequence[str], styles: Sequence[str]) -> dict[str, list[str]]:
    """The content of `vocabulary.json`: "objects" are all names of the objects, "words" the other words of captions.

    Args:
        names, styles: of the drawings, see `icons.load_drawings`; styles are keys of `STYLE_PHRASES`.
    """
    also = [other for item in load_objects() if item.name in set(names) for other in item.also]
    phrases = [
        *GRAMMAR,
        *SMALL,
        *LARGE,
        *PREFIXES,
        *COLOUR_NAMES,
        *GRADIENT_WAYS,
        *(phrase for phrases in PLACE_PHRASES.values() for phrase in phrases),
        *(phrase.replace("{}", " ") for phrases in RELATION_PHRASES.values() for phrase in phrases),
        *(phrase for style in styles for phrases in STYLE_PHRASES[style] for phrase in phrases),
    ]
    return {
        "objects": sorted({*names, *also}, key=str.lower),
        "words": sorted({word for phrase in phrases for word in phrase.lower().split()}),
    }
