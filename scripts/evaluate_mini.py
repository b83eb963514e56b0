"""Judges the miniature on its fixed prompts: a table of scores stage by stage, and sheets of the pictures."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cascade.images.tensors import to_image, to_pixels
from cascade.pipeline import Cascade
from cascade.weights import WeightsError
from miniature.compose import compose
from miniature.evaluate import (
    PROMPTS,
    Prompt,
    Verdict,
    doubt,
    evaluate,
    generate_batch,
    load_prompts,
    plans_of,
    sheet,
    stage_pictures,
    summarise,
    table,
)
from miniature.evaluate_images import evaluate_images, make_scenes
from miniature.icons import load_drawings
from miniature.judge import Judge
from scripts.environment import ROOT
from training.errors import TrainingError
from training.pictures import psnr

SHEET = 100
"""Pictures of a sheet."""

Pictures = dict[str, list[Image.Image]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/evaluate-mini", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini")
    parser.add_argument("--drawings", type=Path, default=ROOT / "build" / "mini" / "drawings.zip")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mini" / "evaluation")
    parser.add_argument("--batch", type=int, default=50, help="pictures made at a time")
    parser.add_argument("--limit", type=int, help="this many prompts only, spread over all of them")
    parser.add_argument(
        "--guidance", type=float, nargs="*", default=[], help="scales of Stage C to try besides the model's own"
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="?",
        const=200,
        default=0,
        metavar="SCENES",
        help="also judge the uses of images, on at most this many scenes (200)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(evaluate_model(options))
    except (TrainingError, WeightsError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def evaluate_model(options: argparse.Namespace) -> str:
    """Makes and judges all pictures; writes ``table.md``, sheets and ``verdicts.tsv``. Returns the table.

    Args:
        options: as `parse` returns them.

    Raises:
        TrainingError: the drawings are missing or damaged.
        WeightsError: the weights are.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    drawings, names, styles = load_drawings(options.drawings)
    # The authors' networks in float32: what is judged is the weights, not the arithmetic.
    cascade = Cascade.load(options.weights, dtype=torch.float32, memory="resident")
    judge = Judge(drawings.to(cascade.device), names, styles)
    prompts = load_prompts(options.prompts)
    alone = [prompt for prompt in prompts if prompt.unseen and len(prompt.objects) == 1][: options.images]
    if options.limit:
        prompts = prompts[:: -(-len(prompts) // options.limit)]

    def draw(batch: Sequence[Prompt]) -> Tensor:
        return compose(drawings, plans_of(batch, names, styles), len(styles), (cascade.native_size,) * 2)

    made, ratios = pictures_by_stage(cascade, prompts, draw, options.batch)
    columns = {}
    for stage, pictures in made.items():
        verdicts, _ = evaluate(replay(pictures), judge, prompts, cascade.device, options.batch)
        columns[stage] = summarise(verdicts)
    verdicts, made["C + B + A"] = evaluate(
        partial(generate_batch, cascade), judge, prompts, cascade.device, options.batch
    )
    columns["C + B + A"] = summarise(verdicts)
    for guidance in options.guidance:
        name = f"guidance {guidance:g}"
        generate = partial(generate_batch, cascade, guidance=guidance)
        judged, made[name] = evaluate(generate, judge, prompts, cascade.device, options.batch)
        columns[name] = summarise(judged)

    lines = [table(columns), "", *fidelity(ratios, prompts)]
    if options.images:
        scenes = make_scenes(alone, drawings, names, styles, cascade.native_size)
        for heading, outcome in evaluate_images(cascade, judge, scenes):
            lines += ["", heading, "", table(outcome.scores)]
            made |= outcome.pictures
        lines += ["", doubt(len(scenes), "scenes")]
    lines += ["", doubt(len(prompts), "prompts")]
    report = "\n".join(lines).rstrip()
    (options.output / "table.md").write_text(report + "\n")
    write_sheets(made, options.output)
    write_verdicts(verdicts, options.output / "verdicts.tsv")
    return report


def pictures_by_stage(
    cascade: Cascade, prompts: Sequence[Prompt], draw: Callable[[Sequence[Prompt]], Tensor], batch: int
) -> tuple[Pictures, dict[str, list[float]]]:
    """The true scenes, and what Stages A, and B and A, leave of them, with their PSNR in dB.

    They are made ``batch`` at a time, so that any number of prompts fits into memory.

    Args:
        draw: the true scenes of prompts, float (n, 3, S, S) in 0..1.
    """
    made: Pictures = {"scenes": [], "A": [], "B + A": []}
    ratios: dict[str, list[float]] = {"A": [], "B + A": []}
    for first in range(0, len(prompts), batch):
        chosen = prompts[first : first + batch]
        scenes = draw(chosen)
        made["scenes"] += [to_image(scene) for scene in scenes]
        texts, seeds = [prompt.text for prompt in chosen], [prompt.seed for prompt in chosen]
        for stage, pictures in stage_pictures(cascade, scenes, texts, seeds).items():
            made[stage] += pictures
            ratios[stage] += [
                psnr(to_pixels(picture), scene.cpu()) for picture, scene in zip(pictures, scenes, strict=True)
            ]
    return made, ratios


def replay(pictures: Sequence[Image.Image]) -> Callable[[list[str], list[int]], list[Image.Image]]:
    """For `evaluate`: pictures that exist already, as many as it asks for, in order."""
    remaining: Iterator[Image.Image] = iter(pictures)
    return lambda texts, seeds: [next(remaining) for _ in texts]


def fidelity(ratios: dict[str, list[float]], prompts: Sequence[Prompt]) -> list[str]:
    """A line a stage: the mean PSNR of scenes with combinations that training never shows; none without such scenes."""
    unseen = [index for index, prompt in enumerate(prompts) if prompt.unseen]
    if not unseen:
        return []
    means = {stage: sum(values[index] for index in unseen) / len(unseen) for stage, values in ratios.items()}
    scenes = f"{len(unseen)} scenes with combinations that training never shows"
    return [f"{stage}: {mean:.2f} dB PSNR on {scenes}." for stage, mean in means.items()]


def write_sheets(made: Pictures, folder: Path) -> None:
    """Writes all pictures, `SHEET` a file, ten a row."""
    for stage, pictures in made.items():
        for number, first in enumerate(range(0, len(pictures), SHEET)):
            file = f"{stage.replace(' + ', '').replace(' ', '-').lower()}-{number}.png"
            sheet(pictures[first : first + SHEET], 10).save(folder / file)


def write_verdicts(verdicts: Sequence[Verdict], file: Path) -> None:
    """Writes a line a prompt: its objects' ranks, whether the background is right, and whether training has seen the pair."""
    lines = [f"{v.ranks}\t{v.background}\t{'unseen' if v.prompt.unseen else 'seen'}\t{v.prompt.text}" for v in verdicts]
    file.write_text("ranks\tbackground\tpair\tprompt\n" + "\n".join(lines) + "\n")
