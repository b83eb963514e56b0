"""How much do weights in prompts change on the miniature?

    python -m miniature.evaluate_prompts --drawings build/mini/drawings.zip --count 100

Tries weight 0 for one of two objects, compared with weight 1 and with the prompt without it; and two background colours, of
which the first has the weight w and the second 2 - w. Weights change either the hidden states alone, as in ComfyUI, or the
pooled text too. Writes a table to the standard output, and with --output sheets of the first pictures.
"""

import argparse
import logging
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.images.tensors import to_pixels
from cascade.pipeline import Cascade
from cascade.request import Request
from miniature.captions import article
from miniature.icons import load_drawings
from miniature.judge import Judge, background_colours
from miniature.prompts import make_prompts
from miniature.scenes import COLOUR_NAMES

WEIGHTS = (0.5, 0.75, 1.0, 1.25, 1.5)
SEED = 3
AT_ONCE = 20
"""Pictures asked for at a time; how many are made together is the model's `max_batch`."""

POOLED = {"states": False, "states and pooled": True}


@dataclass(frozen=True)
class Pair:
    """Two objects, side by side in this order, on a plain background; and a second colour."""

    objects: tuple[str, str]
    colour: str
    other_colour: str
    seed: int

    def request(self, *weights: float) -> Request:
        """Both objects, with a weight each."""
        phrases = [weighted(article(name), weight) for name, weight in zip(self.objects, weights, strict=True)]
        return Request(f"{' next to '.join(phrases)} on {article(self.colour)} background", seed=self.seed)

    def alone(self, place: int) -> Request:
        """One of the objects."""
        prompt = f"{article(self.objects[place])} on {article(self.colour)} background"
        return Request(prompt, seed=self.seed)

    def coloured(self, weight: float) -> Request:
        """The first object on a background of both colours."""
        an = article(self.colour).removesuffix(self.colour)
        colours = f"{an}{weighted(self.colour, weight)} {weighted(self.other_colour, 2 - weight)}"
        return Request(f"{article(self.objects[0])} on {colours} background", seed=self.seed)


def weighted(words: str, weight: float) -> str:
    return words if weight == 1 else f"({words}:{weight:g})"


def make_pairs(names: Sequence[str], styles: Sequence[str], count: int) -> list[Pair]:
    """Pairs of the test prompts with two objects, half of them unseen in training; the same for the same arguments."""
    prompts = [one for one in make_prompts(names, styles, SEED, 4 * count) if len(one.objects) == 2]
    rng = random.Random(SEED)
    rng.shuffle(prompts)
    pairs = []
    for prompt in prompts[:count]:
        first, second = prompt.objects
        colour, other = rng.sample(COLOUR_NAMES, 2)
        pairs.append(Pair((first, second), colour, other, prompt.seed))
    return pairs


def ranks(judge: Judge, picture: Tensor, pair: Pair) -> tuple[int, int]:
    """For each object, its best rank among all names: as the only object of a picture (3, S, S), or in its half of it."""
    views = judge.ranked(picture), judge.ranked(picture, None, "next to")
    first, second = (min(view[i if len(view) > 1 else 0].index(pair.objects[i]) for view in views) for i in (0, 1))
    return first, second


class Evaluation:
    """Makes pictures and judges them.

    Attributes:
        pictures: those made so far, by what they show.
    """

    def __init__(self, cascade: Cascade, judge: Judge, pairs: Sequence[Pair], options: Mapping[str, float]) -> None:
        self.cascade, self.judge, self.pairs, self.options = cascade, judge, pairs, options
        self.pictures: dict[str, list[Image.Image]] = {}

    def removed(self) -> list[str]:
        """Rows of a table: what is left of an object at weight 0, and of the other one."""
        rows = ["| | gone | other first | both |", "|---|---:|---:|---:|"]
        both = self._ranks("weight 1", [pair.request(1, 1) for pair in self.pairs])
        for place, which in ((0, "first"), (1, "second")):
            zeros = [pair.request(*((0, 1) if place == 0 else (1, 0))) for pair in self.pairs]
            made = {f"{which}, weight 1": both}
            for name, pooled in POOLED.items():
                title = f"{which}, weight 0, {name}"
                requests = [replace(one, prompt_weighting=True, weight_pooled=pooled) for one in zeros]
                made[title] = self._ranks(title, requests)
            title = f"{which}, without it"
            made[title] = self._ranks(title, [pair.alone(1 - place) for pair in self.pairs])
            for title, judged in made.items():
                gone = [rank[place] >= 5 for rank in judged]
                kept = [rank[1 - place] == 0 for rank in judged]
                each = [one and other for one, other in zip(gone, kept, strict=True)]
                rows.append(f"| {title} | {' | '.join(share(column) for column in (gone, kept, each))} |")
        return rows

    def recoloured(self) -> list[str]:
        """Rows of a table: how often the background is of the first colour, of the second, and of another."""
        rows = ["| | w | first colour | second | another |", "|---|---:|---:|---:|---:|"]
        for name, pooled in POOLED.items():
            for weight in WEIGHTS:
                requests = [
                    replace(pair.coloured(weight), prompt_weighting=True, weight_pooled=pooled) for pair in self.pairs
                ]
                title = f"{name}, w {weight:g}"
                seen = [background_colours(to_pixels(one))[0][0] for one in self._make(title, requests)]
                first = [colour == pair.colour for colour, pair in zip(seen, self.pairs, strict=True)]
                second = [colour == pair.other_colour for colour, pair in zip(seen, self.pairs, strict=True)]
                other = [not (one or two) for one, two in zip(first, second, strict=True)]
                rows.append(
                    f"| {name} | {weight:g} | {' | '.join(share(column) for column in (first, second, other))} |"
                )
        return rows

    def _ranks(self, title: str, requests: Sequence[Request]) -> list[tuple[int, int]]:
        pictures = self._make(title, requests)
        return [
            ranks(self.judge, to_pixels(picture)[0].to(self.judge.device), pair)
            for picture, pair in zip(pictures, self.pairs, strict=True)
        ]

    def _make(self, title: str, requests: Sequence[Request]) -> list[Image.Image]:
        made = []
        for first in tqdm(range(0, len(requests), AT_ONCE), desc=title, unit="batch"):
            batch = [replace(one, **self.options) for one in requests[first : first + AT_ONCE]]
            made += [picture for (picture,) in self.cascade.batch(batch)]
        self.pictures[title] = made
        return made


def share(column: Sequence[bool]) -> str:
    return f"{100 * sum(column) / len(column):.0f} %"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m miniature.evaluate_prompts", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=Path("weights/mini"))
    parser.add_argument("--drawings", type=Path, default=Path("build/mini/drawings.zip"))
    parser.add_argument("--count", type=int, default=100, help="pairs of objects (default: 100)")
    parser.add_argument("--steps-prior", type=int, help="default: the model's own")
    parser.add_argument("--steps-decoder", type=int, help="default: the model's own")
    parser.add_argument("--output", type=Path, help="a folder for the pictures")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    drawings, names, styles = load_drawings(options.drawings)
    cascade = Cascade.load(options.weights)
    judge = Judge(drawings.to(cascade.device), names, styles)
    asked = {"steps_prior": options.steps_prior, "steps_decoder": options.steps_decoder}
    evaluation = Evaluation(cascade, judge, make_pairs(names, styles, options.count), asked)
    for measure in (evaluation.removed, evaluation.recoloured):
        sys.stdout.write("\n".join(measure()) + "\n\n")
        sys.stdout.flush()
    if options.output is not None:
        for title, pictures in evaluation.pictures.items():
            folder = options.output / title
            folder.mkdir(parents=True, exist_ok=True)
            for pair, picture in zip(evaluation.pairs, pictures, strict=True):
                picture.save(folder / f"{pair.seed}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
