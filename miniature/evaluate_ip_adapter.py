"""How well does the miniature's IP-Adapter use references? Compares its pictures with those of image prompts, same seeds.

    .venv/bin/python -m miniature.evaluate_ip_adapter --seed 4711 --scenes 200 --ablate 50

The judge is not trained (`judge`). References are scenes with combinations that training never shows, in styles drawn evenly.
With --ablate, pictures are also made at several scales, with each adapted block alone, and with all but one. This shows which
blocks carry style and composition. Writes ``table.md``, ``scores.json`` and sheets of the pictures.
"""

import argparse
import json
import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.images.tensors import to_image, to_pixels
from cascade.networks.ip_adapter import IPAdapter
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights import ModelFolder, WeightsError
from miniature.captions import article
from miniature.compose import compose
from miniature.fingerprint import fingerprint
from miniature.icons import load_drawings
from miniature.judge import Judge, background_colours
from miniature.scenes import COLOUR_NAMES, sample_plans
from miniature.scores import Values, estimate, table
from miniature.sheets import sheet
from training.errors import TrainingError, writing
from training.pictures import ssim

logger = logging.getLogger(__name__)

SEEDS = 4
"""Pictures of each reference alone, whose likeness is measured."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
ON_SHEET = 50

Generate = Callable[[Request], list[Image.Image]]
Way = Callable[[Image.Image], Mapping[str, Any]]
"""A reference -> the attributes of a request that shows it to the model."""


@dataclass(frozen=True)
class Case:
    """A reference, and the pictures to make from it.

    Attributes:
        image: the reference, RGB and square.
        name, style: of the drawing that it shows.
        other: another object, which a prompt names.
        colour: of `COLOUR_NAMES`, another background than the reference's, which a prompt names.
        seed: of the pictures.
    """

    image: Image.Image
    name: str
    style: str
    other: str
    colour: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Scores of ways to use references: {way: {score: one value a case}}, and the pictures by way."""

    scores: dict[str, Values]
    pictures: dict[str, list[Image.Image]]


def make_cases(
    drawings: Tensor, names: Sequence[str], styles: Sequence[str], seed: int, count: int, side: int
) -> list[Case]:
    """Cases, the same for the same arguments.

    Args:
        drawings, names, styles: of `icons.load_drawings`.
        seed: at least 0. It shares no random numbers with training, nor with `prompts.make_prompts` of any seed.
        count: how many.
        side: of the references in pixels.
    """
    plan_seed, draw_seed, first_seed = (int(one) for one in np.random.SeedSequence((seed, 17)).generate_state(3))
    plans = sample_plans(3 * count + 50, names, plan_seed, "heldout", len(styles))
    plans = plans[plans.objects[:, 1] < 0][:count]
    rng = np.random.default_rng(draw_seed)
    plans = replace(plans, styles=np.repeat(rng.integers(len(styles), size=(count, 1)), 2, axis=1))
    others = (plans.objects[:, 0] + rng.integers(1, len(names), size=count)) % len(names)
    cases = []
    for i in range(count):
        (image,) = pictures = compose(drawings, plans[[i]], len(styles), (side, side))
        # A gradient can be taken for a plain background of a third colour.
        own = {*(COLOUR_NAMES[colour] for colour in plans.colours[i]), background_colours(pictures)[0][0]}
        colours = [colour for colour in COLOUR_NAMES if colour not in own]
        cases.append(
            Case(
                to_image(image),
                names[plans.objects[i, 0]],
                styles[plans.styles[i, 0]],
                names[others[i]],
                colours[rng.integers(len(colours))],
                first_seed + SEEDS * i,
            )
        )
    return cases


def looked_at(judge: Judge, picture: Image.Image) -> tuple[Tensor, str]:
    """The distances of the object in a picture from every drawing, (names, styles), and the name of its background's colour."""
    pixels = to_pixels(picture, judge.device)
    (distances,) = judge.drawing_distances(pixels[0])
    return distances, background_colours(pixels)[0][0]


def rank_of(judge: Judge, distances: Tensor, name: str) -> int:
    """The place of an object among all names, in any style; 0 is the nearest."""
    nearest = distances.min(1).values
    return int((nearest < nearest[judge.names.index(name)]).sum())


def is_drawing(judge: Judge, distances: Tensor, name: str, style: str) -> float:
    """Whether the nearest of all drawings is this one."""
    nearest = divmod(int(distances.argmin()), len(judge.styles))
    return float(nearest == (judge.names.index(name), judge.styles.index(style)))


def is_style(judge: Judge, distances: Tensor, name: str, style: str) -> float:
    """Whether, of an object's drawings, the nearest is the one in this style."""
    return float(int(distances[judge.names.index(name)].argmin()) == judge.styles.index(style))


def alone(generate: Generate, judge: Judge, cases: Sequence[Case], way: Way) -> tuple[Values, list[Image.Image]]:
    """Pictures of references without a prompt, four of each; the first is judged, and all are compared with each other."""
    scores: Values = {"object first": [], "object in 5": [], "drawing first": [], "likeness of 4 seeds": []}
    pictures = []
    for case in tqdm(cases, desc="alone"):
        made = generate(Request("", seed=case.seed, num_images=SEEDS, **way(case.image)))
        distances, _ = looked_at(judge, made[0])
        rank = rank_of(judge, distances, case.name)
        scores["object first"].append(float(rank < 1))
        scores["object in 5"].append(float(rank < 5))
        scores["drawing first"].append(is_drawing(judge, distances, case.name, case.style))
        pairs = [ssim(to_pixels(one), to_pixels(two)) for one, two in combinations(made, 2)]
        scores["likeness of 4 seeds"].append(sum(pairs) / len(pairs))
        pictures.append(made[0])
    return scores, pictures


def with_background(
    generate: Generate, judge: Judge, cases: Sequence[Case], way: Way
) -> tuple[Values, list[Image.Image]]:
    """Pictures of references with a prompt that names another background, and nothing else."""
    scores: Values = {"object first": [], "background": [], "both": []}
    pictures = []
    for case in tqdm(cases, desc="background"):
        text = article(f"{case.colour} background")
        (made,) = generate(Request(text, seed=case.seed, **way(case.image)))
        distances, colour = looked_at(judge, made)
        first, right = rank_of(judge, distances, case.name) == 0, colour == case.colour
        for score, value in (("object first", first), ("background", right), ("both", first and right)):
            scores[score].append(float(value))
        pictures.append(made)
    return scores, pictures


def with_object(generate: Generate, judge: Judge, cases: Sequence[Case], way: Way) -> tuple[Values, list[Image.Image]]:
    """Pictures of references with a prompt that names another object, whose style it leaves to the reference."""
    scores: Values = {"prompt's object first": [], "reference's object first": [], "style": [], "likeness": []}
    pictures = []
    for case in tqdm(cases, desc="object"):
        (made,) = generate(Request(article(case.other), seed=case.seed, **way(case.image)))
        distances, _ = looked_at(judge, made)
        scores["prompt's object first"].append(float(rank_of(judge, distances, case.other) == 0))
        scores["reference's object first"].append(float(rank_of(judge, distances, case.name) == 0))
        scores["style"].append(is_style(judge, distances, case.other, case.style))
        scores["likeness"].append(ssim(to_pixels(made), to_pixels(case.image)))
        pictures.append(made)
    return scores, pictures


USES = {"alone": alone, "background": with_background, "object": with_object}
HEADINGS = {
    "alone": "References without a prompt. drawing: the object in its style; likeness of 4 seeds: mean SSIM of all pairs.",
    "background": "References with a prompt that names another background.",
    "object": (
        "References with a prompt that names another object. style: of that object's drawings, the nearest has the reference's "
        "style (chance: one in three); likeness: SSIM to the reference."
    ),
    "scales": "The adapter at several scales, without a prompt.",
    "blocks alone": "Each adapted block alone, with a prompt that names another object.",
    "blocks left out": "All adapted blocks but one, without a prompt.",
}


def ways_of(adapter: IPAdapter) -> dict[str, Way]:
    """The ways that are compared: native image prompts, no image at all, and the adapter in each mode that it knows."""
    ways: dict[str, Way] = {
        "native": lambda image: {"image_prompts": (image,)},
        "adapter": lambda image: {"ip_adapter_images": (image,)},
    }
    for mode in ("style", "composition"):
        if adapter.blocks_of(mode):
            ways[f"adapter, {mode}"] = lambda image, mode=mode: {"ip_adapter_images": (image,), "ip_adapter_mode": mode}
    return {**ways, "no image": lambda image: {}}


def evaluate(generate: Generate, judge: Judge, cases: Sequence[Case], ways: Mapping[str, Way]) -> dict[str, Outcome]:
    """The outcome of every use in `USES`, each in all ways, of the same seeds."""
    outcomes = {}
    for use, run in USES.items():
        made = {name: run(generate, judge, cases, way) for name, way in ways.items()}
        outcomes[use] = Outcome(
            {name: scores for name, (scores, _) in made.items()},
            {name: pictures for name, (_, pictures) in made.items()},
        )
    return outcomes


def ablate(
    generate: Generate, judge: Judge, cases: Sequence[Case], adapter: IPAdapter
) -> Iterator[tuple[str, Outcome]]:
    """The effect of scales and blocks. While it runs, the adapter's configuration names the tried blocks as its style blocks."""

    def outcome(use: str, ways: Mapping[str, Way]) -> Outcome:
        made = {name: USES[use](generate, judge, cases, way) for name, way in ways.items()}
        return Outcome({name: one for name, (one, _) in made.items()}, {name: two for name, (_, two) in made.items()})

    def with_blocks(blocks: Sequence[int]) -> Way:
        def way(image: Image.Image) -> Mapping[str, Any]:
            adapter.register_to_config(style_blocks=tuple(blocks))
            return {"ip_adapter_images": (image,), "ip_adapter_mode": "style"}

        return way

    def scaled(scale: float) -> Way:
        return lambda image: {"ip_adapter_images": (image,), "ip_adapter_scales": (scale,)}

    yield "scales", outcome("alone", {f"{scale:g}": scaled(scale) for scale in SCALES})
    known, blocks = adapter.config.style_blocks, tuple(adapter.config.blocks)
    try:
        singles = {f"{block}": with_blocks([block]) for block in blocks}
        yield "blocks alone", outcome("object", {"all": with_blocks(blocks), **singles})
        if len(blocks) > 1:
            but_one = {f"{block}": with_blocks([one for one in blocks if one != block]) for block in blocks}
            yield "blocks left out", outcome("alone", {"none": with_blocks(blocks), **but_one})
    finally:
        adapter.register_to_config(style_blocks=known)


def report(outcomes: Mapping[str, Outcome], cases: int, seed: int) -> str:
    """All tables as Markdown."""
    lines = [f"{cases} references, --seed {seed}. In brackets, 95 % intervals for other references.", ""]
    for name, outcome in outcomes.items():
        lines += [HEADINGS[name], "", table(outcome.scores), ""]
    return "\n".join(lines).rstrip() + "\n"


def save(
    outcomes: Mapping[str, Outcome], cases: Sequence[Case], seed: int, folder: Path, weights: str | None = None
) -> str:
    """Writes tables, scores and sheets, a row of each the references or one way; returns the tables.

    Args:
        weights: whose pictures these are, see `fingerprint.fingerprint`.

    Raises:
        TrainingError: a file cannot be written.
    """
    said = report(outcomes, len(cases), seed)
    scores = {
        name: {
            way: {key: asdict(estimate(one)) for key, one in values.items()} for way, values in outcome.scores.items()
        }
        for name, outcome in outcomes.items()
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(said, encoding="utf-8")
        (folder / "scores.json").write_text(
            json.dumps({"seed": seed, "weights": weights, "scores": scores}, indent=2) + "\n", encoding="utf-8"
        )
        for name, outcome in outcomes.items():
            columns = min(ON_SHEET, min(map(len, outcome.pictures.values())))
            rows = [[case.image for case in cases[:columns]], *(one[:columns] for one in outcome.pictures.values())]
            sheet([picture for row in rows for picture in row], columns).save(folder / f"{name.replace(' ', '-')}.png")
    return said


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="miniature.evaluate_ip_adapter", description=__doc__.split("\n")[0])
    root = Path(__file__).parent.parent
    parser.add_argument("--weights", type=Path, default=root / "weights" / "mini", help="default: %(default)s")
    parser.add_argument(
        "--drawings", type=Path, default=root / "build" / "mini" / "drawings.zip", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, default=root / "build" / "mini" / "ip-adapter", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, help="draws references and pictures (default: a random one, which is printed)"
    )
    parser.add_argument("--scenes", type=int, default=200, help="number of references (default: %(default)s)")
    parser.add_argument(
        "--ablate", type=int, default=0, metavar="SCENES", help="also try scales and blocks, on as many references"
    )
    options = parser.parse_args(arguments)
    for name, least in (("seed", 0), ("scenes", 1), ("ablate", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    logger.info("--seed %d", seed)
    try:
        drawings, names, styles = load_drawings(options.drawings)
        if "ip_adapter" not in ModelFolder.open(options.weights):
            raise TrainingError(f"{options.weights} has no ip_adapter; train the stage ip_adapter first.")
        # float32: the weights are judged, not the arithmetic.
        cascade = Cascade.load(options.weights, dtype=torch.float32, memory="resident", max_batch=SEEDS)
        judge = Judge(drawings.to(cascade.device), names, styles)
        cases = make_cases(drawings, names, styles, seed, options.scenes, cascade.native_size)
        weights = fingerprint(options.weights, "ip_adapter")
        outcomes = evaluate(cascade.generate, judge, cases, ways_of(cascade.ip_adapter))
        sys.stdout.write(save(outcomes, cases, seed, options.output, weights))
        if options.ablate:
            # Other references, because these decide on the modes that are judged above.
            tried = make_cases(drawings, names, styles, seed + 1, options.ablate, cascade.native_size)
            ablated = dict(ablate(cascade.generate, judge, tried, cascade.ip_adapter))
            sys.stdout.write(save(ablated, tried, seed + 1, options.output / "ablation", weights))
    except (TrainingError, WeightsError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
