"""The command line of ``scripts/train-lora``; several processes start this module, see docs/training.md."""

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState

from serving.early import find_weights
from training import command
from training.lora.file import FILE
from training.lora.pictures import find_pictures
from training.lora.run import train_lora
from training.lora.settings import TARGET_NAMES, Recipe, read_recipe
from training.processes import start_processes

logger = logging.getLogger(__name__)

# By name of the value: its type on the command line, and its help. Everything else is set in a recipe.
OF_LORA: dict[str, tuple[Any, str]] = {
    "rank": (int, "rank of every layer's LoRA (default: 16)"),
    "alpha": (float, "the change is alpha / rank times the product (default: rank)"),
    "caption": (str, "of the pictures that have no text file beside them"),
    "caption_prefix": (str, "put before every caption"),
    "word": (str, "put before every caption that does not have it"),
    "begins_from": (
        str,
        "known words that --word begins from; it is then learned as a new word, which the file brings",
    ),
    "vectors": (int, "tokens of a learned word (default: 1)"),
    "caption_dropout": (float, "share of the samples without caption (default: 0.05)"),
    "resolution": (int, "pixels of a side of a square of the pictures' area (default: the model's own)"),
    "text_encoder_rank": (int, "rank of a LoRA of the text encoder (default: 0, none)"),
    "title": (str, "in the file's metadata (default: the output folder's name)"),
}
OF_OPTIONS: dict[str, tuple[Any, str]] = {
    "steps": (int, "optimizer steps (default: 1000)"),
    "batch_size": (int, "pictures of a step, of one process (default: 1)"),
    "learning_rate": (float, "the largest (default: 1e-4)"),
    "seed": (int, "decides all draws (default: 0)"),
}
LISTS = {
    "targets": "layers of Stage C (default: attention)",
    "preserve": "a prompt of what shall stay as it is, such as 'a photo of a cat'",
    "samples": "a prompt, of which evaluations make pictures",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/train-lora", description="Train a LoRA of Stage C on pictures.")
    parser.add_argument("pictures", type=Path, help="a folder or a zip of pictures, with captions beside them")
    parser.add_argument("--output", type=Path, required=True, help="the folder that gets lora.safetensors")
    parser.add_argument(
        "--weights",
        type=Path,
        default=find_weights(),
        help="the model folder (default: CASCADE_WEIGHTS, else weights/stable-cascade, else weights/mini)",
    )
    parser.add_argument("--lite", action="store_true", help="of the published repositories, the smaller Stage C")
    parser.add_argument(
        "--recipe", type=Path, help="a TOML file with [lora] and [options]; the options here replace it"
    )
    command.add_minutes(parser)
    for name, (kind, text) in {**OF_LORA, **OF_OPTIONS}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    parser.add_argument("--target", dest="targets", action="append", choices=TARGET_NAMES, help=LISTS["targets"])
    parser.add_argument("--preserve", action="append", metavar="PROMPT", help=LISTS["preserve"])
    parser.add_argument("--sample", dest="samples", action="append", metavar="PROMPT", help=LISTS["samples"])
    parser.add_argument(
        "--no-gradient-checkpointing", action="store_true", help="faster by a third; takes several times the memory"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks; the first steps take minutes")
    return parser.parse_args(arguments)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the command line asks for.

    Raises:
        TrainingError: a value is wrong.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    lora = {name: value for name, value in given.items() if name in OF_LORA or name in LISTS}
    if options.no_gradient_checkpointing:
        lora["gradient_checkpointing"] = False
    if options.compile:
        lora["compile_blocks"] = True
    recipe = read_recipe(options.recipe) if options.recipe else Recipe()
    return recipe.changed(lora, {name: value for name, value in given.items() if name in OF_OPTIONS})


def main(arguments: list[str] | None = None) -> int:
    """Command line; ``arguments`` default to the process's. Returns the exit code."""
    options = parse(arguments)
    deadline = time.time() + 60 * options.minutes

    def work() -> None:
        recipe, state = recipe_of(options), start_processes()
        pictures = _pictures(options, state)
        finished = train_lora(options.weights, pictures, options.output, recipe, lite=options.lite, deadline=deadline)
        if state.is_main_process:
            logger.info("%s is written%s.", options.output / FILE, "" if finished else "; call again to go on")

    return command.run(work)


def _pictures(options: argparse.Namespace, state: PartialState) -> Path:
    """The folder of pictures; a zip is unpacked by one process for all."""
    scratch = options.output / "pictures"
    if state.is_main_process:
        found = find_pictures(options.pictures, scratch)
    state.wait_for_everyone()
    return found if state.is_main_process else options.pictures if options.pictures.is_dir() else scratch


if __name__ == "__main__":
    sys.exit(main())
