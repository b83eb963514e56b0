"""Judges the miniature on fresh sets of prompts: scores by stage, sheets of pictures, and what settings cost."""

import argparse
import json
import logging
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.images.tensors import to_image
from cascade.limits import InputError
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.speeds import SPEEDS
from cascade.weights import TURBO, WeightsError
from miniature.compare import compare, comparison_table
from miniature.compose import compose
from miniature.evaluate import (
    Pictures,
    Verdict,
    fidelity,
    pictures_by_stage,
    score_pictures,
    text_to_pictures,
)
from miniature.evaluate_images import HEADINGS, evaluate_images, make_scenes
from miniature.evaluate_large import WHOLE_SIDE, evaluate_large
from miniature.evaluate_loras import STYLE_FILE, SUBJECT_FILE, judge_style, judge_subject
from miniature.fingerprint import fingerprint
from miniature.icons import load_drawings
from miniature.judge import Judge
from miniature.prompts import make_prompts, plans_of
from miniature.scores import estimate, pooled, table
from miniature.sheets import sheet
from scripts.environment import ROOT
from training.errors import TrainingError, writing
from training.files import whole_file

logger = logging.getLogger(__name__)

SETTINGS = (
    "steps_prior",
    "steps_decoder",
    "guidance_scale_prior",
    "guidance_scale_decoder",
    "sampler",
    "guidance_interval",
    "speed",
)
# How the settings are read that are not numbers with a fraction.
KINDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    **dict.fromkeys(("steps_prior", "steps_decoder"), ("a whole number", int)),
    **dict.fromkeys(("sampler", "speed"), ("a name", str)),
    "guidance_interval": ("two numbers, as in 0:0.6", lambda text: tuple(map(float, text.split(":")))),
}
SHEET = 100
"""Pictures on a sheet."""

INTERVALS = (
    "In brackets, the 95 % interval for other prompts: Wilson's score interval for shares; for sharpness, similarity, edges and "
    "PSNR, the mean +- 1.96 standard errors."
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/evaluate-mini", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=ROOT / "weights" / "mini", help="default: %(default)s")
    parser.add_argument(
        "--drawings", type=Path, default=ROOT / "build" / "mini" / "drawings.zip", help="default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "mini" / "evaluation", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed",
        type=int,
        help="of the first set; the others count up from it (default: a random one, which is printed)",
    )
    parser.add_argument("--sets", type=int, default=3, help="number of sets (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=700, help="prompts of a set, two in seven of two objects (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=50, help="pictures made at a time (default: %(default)s)")
    parser.add_argument(
        "--try",
        dest="tried",
        nargs="*",
        default=[],
        metavar="KEY=VALUE[,KEY=VALUE]",
        help="settings of a request to try besides the model's own, such as guidance_scale_prior=8,steps_prior=40",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="SPEED|KEY=VALUE[,KEY=VALUE]",
        help="only compare speeds or settings with the model's own, on pairs of pictures of one set's prompts and seeds; an "
        "interval is two numbers, as in guidance_interval=0:0.6",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=1500,
        help="with --compare, prompts of one object, and as many of two (default: %(default)s)",
    )
    parser.add_argument(
        "--images",
        type=int,
        nargs="?",
        const=200,
        default=0,
        metavar="SCENES",
        help="also judge the uses of images, on this many scenes of each set (200)",
    )
    parser.add_argument(
        "--loras",
        type=Path,
        metavar="FOLDER",
        help=f"judge the LoRAs in this folder instead, {STYLE_FILE} and {SUBJECT_FILE}; needs scripts/build-mini-data --loras",
    )
    parser.add_argument(
        "--large",
        type=int,
        nargs="?",
        const=200,
        default=0,
        metavar="PROMPTS",
        help="judge pictures of 512x512 and 1024x512 instead, of this many prompts (200), and Stage B in tiles",
    )
    options = parser.parse_args(arguments)
    least_values = (("large", 0), ("sets", 1), ("prompts", 4), ("batch", 1), ("images", 0), ("seed", 0), ("count", 2))
    for name, least in least_values:
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    for option, texts in (("--try", options.tried), ("--compare", options.compare)):
        try:
            found = {one: read_settings(f"speed={one}" if one in SPEEDS else one) for one in texts}
        except ValueError as error:
            parser.error(f"{option}: {error}")
        setattr(options, "settings" if option == "--try" else "compared", found)
    return options


def read_settings(text: str) -> dict[str, Any]:
    """Settings of a request, from ``KEY=VALUE[,KEY=VALUE]``.

    Raises:
        ValueError: a key or a value is wrong.
    """
    settings: dict[str, Any] = {}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        if key not in SETTINGS:
            raise ValueError(f"{pair!r} must be KEY=VALUE, and KEY one of {', '.join(SETTINGS)}.")
        kind, read = KINDS.get(key, ("a number", float))
        try:
            settings[key] = read(value)
        except ValueError:
            raise ValueError(f"{pair!r} must have {kind}.") from None
    Request("", **settings)  # checks the ranges
    return settings


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.seed is None:
        options.seed = secrets.randbelow(10**6)
        logger.info("The first set has --seed %d.", options.seed)
    try:
        if options.compare:
            print(compare_settings(options))
        elif options.large:
            print(judge_large(options))
        else:
            print(evaluate_loras(options) if options.loras else evaluate_model(options))
    except (TrainingError, WeightsError, InputError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"Interrupted; finished sets are kept. Go on with --seed {options.seed}.\n")
        return 130
    return 0


def compare_settings(options: argparse.Namespace) -> str:
    """Compares settings with the model's own on pairs of pictures, and returns the table; writes it and the values to
    ``compare-SEED.md`` and ``compare-SEED.json``.

    Raises:
        TrainingError: the drawings are missing or damaged, or a file cannot be written.
        WeightsError: the weights are missing or damaged.
        InputError: the model lacks the weights that a speed needs.
    """
    cascade, judge, drawings = load_judge(options)
    for settings in options.compared.values():
        cascade.planner.loras(Request("", **settings))
    prompts = make_prompts(judge.names, judge.styles, options.seed, 2 * options.count, options.count)
    judged = compare(cascade, judge, drawings, prompts, options.compared)
    # With few drawings, there may be fewer pairs than requested.
    two = sum(len(prompt.objects) == 2 for prompt in prompts)
    lines = [
        f"{len(prompts) - two} prompts of one object and {two} of two, --seed {options.seed}, on {device_name(cascade)}.",
        "After a colon, the mean difference to exact in points, on the same prompts and seeds, with its 95 % interval.",
        *(f"{name}: {cascade.planner.sampling(Request('', **one))}." for name, one in options.compared.items()),
    ]
    report = "\n".join(lines) + "\n\n" + comparison_table(judged)
    content = {name: {"values": one.values, "seconds": one.seconds} for name, one in judged.items()}
    file = options.output / f"compare-{options.seed}"
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".md").write_text(report + "\n", encoding="utf-8")
        file.with_suffix(".json").write_text(json.dumps({"of": about(options), "judged": content}), encoding="utf-8")
    return report


def evaluate_loras(options: argparse.Namespace) -> str:
    """Judges the LoRAs that are there, with one set of prompts, and returns the tables; writes them to ``loras-SEED.md``.

    Raises:
        TrainingError: there is none, or the drawings are missing or damaged, or the file cannot be written.
        WeightsError: the weights or a LoRA are damaged.
    """
    drawings, names, _ = load_drawings(options.drawings)
    cascade = Cascade.load(options.weights, dtype=torch.float32, memory="resident", max_batch=options.batch)
    lines = [f"--seed {options.seed}, on {device_name(cascade)}. {INTERVALS}"]
    if (style := options.loras / STYLE_FILE).exists():
        inks, _, _ = load_drawings(options.drawings.parent / "ink-drawings.zip")
        values = judge_style(cascade, style, drawings, inks, names, options.seed)
        lines += ["", table({STYLE_FILE: values})]
    if (subject := options.loras / SUBJECT_FILE).exists():
        values, others = judge_subject(cascade, subject, drawings, names, options.seed)
        lines += ["", table({SUBJECT_FILE: values}), "", table(others)]
    if len(lines) == 1:
        raise TrainingError(f"{options.loras} has neither {STYLE_FILE} nor {SUBJECT_FILE}.")
    report = "\n".join(lines)
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"loras-{options.seed}.md").write_text(report + "\n", encoding="utf-8")
    return report


def judge_large(options: argparse.Namespace) -> str:
    """Judges larger pictures, of one set of prompts, and returns the tables. Writes sheets of the pictures."""
    drawings, names, styles = load_drawings(options.drawings)
    cascade = Cascade.load(options.weights, dtype=torch.float32, memory="resident", max_batch=options.batch)
    judge = Judge(drawings.to(cascade.device), names, styles)
    found = evaluate_large(cascade, judge, drawings, options.seed, options.large)
    folder = options.output / f"large-{options.seed}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_sheets(found.pictures, folder)
    lines = [f"{options.large} prompts of one object, --seed {options.seed}. {INTERVALS}", "", table(found.objects)]
    beside = ", ".join(f"{value:.2f}" for value in found.psnr)
    lines += ["", f"Stage B in tiles beside the whole, {WHOLE_SIDE}x{WHOLE_SIDE}: {beside} dB PSNR."]
    steps = ", ".join(f"{value:.3f} {how}" for how, value in found.seams.items())
    lines.append(f"The mean step across tiles' edges, over that nearby: {steps}.")
    return "\n".join(lines)


def evaluate_model(options: argparse.Namespace) -> str:
    """Judges all sets and returns the tables; writes them to ``table.md`` and ``scores.json``.

    Each set's values are kept in ``set-SEED.json``. A set that has been judged with the same weights and options is not judged
    again, so an interrupted evaluation goes on where it was.

    Args:
        options: as `parse` returns them, with a seed.

    Raises:
        TrainingError: the drawings are missing or damaged, or a file cannot be written.
        WeightsError: the weights are missing or damaged.
    """
    seeds = range(options.seed, options.seed + options.sets)
    judged = [values for seed in seeds if (values := load_set(options, seed))]
    if len(judged) < options.sets:
        judged = judge_sets(options, seeds)
    report, scores = summary(options, judged)
    with writing(options.output):
        (options.output / "table.md").write_text(report + "\n", encoding="utf-8")
        (options.output / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    return report


def load_judge(options: argparse.Namespace) -> tuple[Cascade, Judge, Tensor]:
    """The model, the judge, and its drawings on the CPU."""
    drawings, names, styles = load_drawings(options.drawings)
    # float32: the weights are judged, not the arithmetic.
    cascade = Cascade.load(options.weights, dtype=torch.float32, memory="resident", max_batch=options.batch)
    return cascade, Judge(drawings.to(cascade.device), names, styles), drawings


def judge_sets(options: argparse.Namespace, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The values of all sets; those that have not been judged yet are judged and kept."""
    cascade, judge, drawings = load_judge(options)
    judged = []
    for seed in seeds:
        values = load_set(options, seed)
        if values is None:
            logger.info("Set %d.", seed)
            values = judge_set(options, seed, cascade, judge, drawings)
            with writing(set_file(options, seed)), whole_file(set_file(options, seed)) as part:
                part.write_text(json.dumps({"of": about(options), "values": values}), encoding="utf-8")
        judged.append(values)
    return judged


def judge_set(
    options: argparse.Namespace, seed: int, cascade: Cascade, judge: Judge, drawings: Tensor
) -> dict[str, Any]:
    """The values of one set: ``text``, ``fidelity``, and ``images`` by use; and the ``device``. Writes sheets and
    ``verdicts.tsv``."""
    names, styles, side = judge.names, judge.styles, cascade.native_size
    prompts = make_prompts(names, styles, seed, options.prompts)
    scenes = []
    for first in range(0, len(prompts), SHEET):  # all at once would take gigabytes
        plans = plans_of(prompts[first : first + SHEET], names, styles)
        scenes += [to_image(scene) for scene in compose(drawings, plans, len(styles), (side, side))]
    made = pictures_by_stage(cascade, scenes, prompts)
    for name, settings in options.settings.items():
        made[name] = text_to_pictures(cascade, prompts, **settings)
    text, verdicts = {}, {}
    for column, pictures in made.items():
        text[column], verdicts[column] = score_pictures(judge, pictures, scenes, prompts)
    values = {"device": device_name(cascade), "text": text, "fidelity": fidelity(made, prompts), "images": {}}
    if options.images:
        alone = [prompt for prompt in prompts if prompt.unseen and len(prompt.objects) == 1][: options.images]
        for use, outcome in evaluate_images(
            cascade, judge, make_scenes(alone, drawings, names, styles, cascade.native_size)
        ):
            values["images"][use] = outcome.scores
            made |= outcome.pictures
    folder = options.output / f"set-{seed}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_sheets(made, folder)
        write_verdicts(verdicts["C + B + A"], folder / "verdicts.tsv")
    return values


def device_name(cascade: Cascade) -> str:
    return torch.cuda.get_device_name(cascade.device) if cascade.device.type == "cuda" else cascade.device.type


def set_file(options: argparse.Namespace, seed: int) -> Path:
    return options.output / f"set-{seed}.json"


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What a set's values, or those of a comparison, depend on besides its seed."""
    turbo = [TURBO] if "turbo" in str([options.tried, options.compare]) else []
    options_of_sets = {name: getattr(options, name) for name in ("prompts", "tried", "images")}
    return {"weights": fingerprint(options.weights, *turbo), **options_of_sets}


def load_set(options: argparse.Namespace, seed: int) -> dict[str, Any] | None:
    """The values of a set that has been judged with the same weights and options; else None."""
    try:
        content = json.loads(set_file(options, seed).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content["values"] if content.get("of") == about(options) else None


def summary(options: argparse.Namespace, judged: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The tables of all sets together as Markdown, and their estimates by table, column and score."""
    seeds = [str(options.seed + index) for index in range(len(judged))]
    sets = f"{len(judged)} sets of {options.prompts} prompts" if len(judged) > 1 else f"{options.prompts} prompts"
    text = pooled([values["text"] for values in judged])
    devices = " and ".join(sorted({values["device"] for values in judged}))
    lines = [f"{sets}, --seed {', '.join(seeds)}, on {devices}. {INTERVALS}", "", table(text), ""]
    ratios = pooled([{"": values["fidelity"]} for values in judged])[""]
    for stage, decibels in ratios.items():
        if decibels:
            one = estimate(decibels)
            lines.append(
                f"{stage}: {one.mean:.2f} dB PSNR ({one.low:.2f} to {one.high:.2f}) on {one.count} scenes with combinations "
                "that training never shows."
            )
    tables = {"text": text}
    for use, heading in HEADINGS.items():
        chosen = [values["images"][use] for values in judged if use in values["images"]]
        if chosen:
            tables[use] = pooled(chosen)
            count = max(len(values) for scores in tables[use].values() for values in scores.values())
            lines += ["", f"{heading} {count} scenes.", "", table(tables[use])]
    scores: dict[str, Any] = {
        name: {
            column: {score: asdict(estimate(values)) for score, values in rows.items()}
            for column, rows in columns.items()
        }
        for name, columns in tables.items()
    }
    return "\n".join(lines).rstrip(), {"seeds": seeds, **about(options), "scores": scores}


def write_sheets(made: Pictures, folder: Path) -> None:
    """Writes all pictures as sheets of `SHEET`, ten to a row."""
    for stage, pictures in made.items():
        for number, first in enumerate(range(0, len(pictures), SHEET)):
            file = f"{stage.replace(' + ', '').replace(' ', '-').lower()}-{number}.png"
            sheet(pictures[first : first + SHEET], 10).save(folder / file)


def write_verdicts(verdicts: Sequence[Verdict], file: Path) -> None:
    """Writes a line a prompt: its objects' ranks, whether the background is right, and whether training shows the pair."""
    lines = [f"{v.ranks}\t{v.background}\t{'unseen' if v.prompt.unseen else 'seen'}\t{v.prompt.text}" for v in verdicts]
    file.write_text("ranks\tbackground\tpair\tprompt\n" + "\n".join(lines) + "\n", encoding="utf-8")
