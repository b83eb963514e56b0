"""Makes the miniature in ``weights/mini`` out of what a training has finished, and writes its card."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from cascade import Cascade, Lora, Request
from cascade.limits import InputError
from cascade.weights import DISTILLED, WeightsError
from cascade.weights.writing import replacement
from miniature.card import Scores, write_card
from miniature.shipping import LORAS, add_loras, ship, sizes
from scripts.environment import ROOT
from training.configuration import read_configuration
from training.errors import TrainingError, writing

PROMPT = "a red apple on a green background"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/ship-mini", description=__doc__.split("\n")[0])
    parser.add_argument(
        "trained",
        type=Path,
        nargs="?",
        help="the folder of scripts/train-mini --copy-to, or its --output; without it, the components stay",
    )
    parser.add_argument("--config", type=Path, default=ROOT / "miniature" / "mini.toml", help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "weights" / "mini", help="the folder to change (default: %(default)s)"
    )
    parser.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument("--scores", type=Path, metavar="FOLDER", help="the output of scripts/evaluate-mini")
    parser.add_argument("--ip-adapter-scores", type=Path, metavar="FOLDER", help="of miniature.evaluate_ip_adapter")
    parser.add_argument("--turbo-scores", type=Path, metavar="FILE", help="compare-SEED.json of --compare turbo")
    parser.add_argument("--lora-scores", type=Path, metavar="FILE", help="loras-SEED.md of --loras")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options, made = parse(arguments), None
    try:
        # A copy, so that the folder stays as it is if anything fails.
        with writing(options.folder), replacement(options.folder) as made:
            new = ["loras"] if options.lora else []
            if options.trained is not None:
                shipment = ship(read_configuration(options.config), options.trained, made)
                new += shipment.new
                print(shipment)
            if options.lora:
                add_loras(made, options.lora)
            scores = (options.scores, options.ip_adapter_scores, options.turbo_scores, options.lora_scores)
            write_card(made, Scores(*scores), new)
            try_out(made)
    except (TrainingError, WeightsError, InputError) as error:
        sys.stderr.write(str(error).replace(str(made), str(options.folder)) + "\n")
        return 1
    for name, size in sizes(options.folder).items():
        print(f"Size {name}: {size / 1e6:.2f} MB.")
    return 0


def try_out(folder: Path) -> None:
    """Makes pictures in few steps: of a prompt, at the speed turbo, of a reference and with each LoRA.

    Raises:
        TrainingError: a picture has one colour only, as untrained weights make it.
        WeightsError, InputError: a component is damaged, or a LoRA does not fit.
    """
    cascade = Cascade.load(folder, "cpu")
    plain = Request(PROMPT, seed=0, steps_prior=2, steps_decoder=1)
    (picture,) = cascade.generate(plain)
    requests = {"turbo": replace(plain, speed="turbo")} if (folder / DISTILLED).is_file() else {}
    if cascade.ip_adapter is not None:
        requests["the IP-Adapter"] = replace(plain, ip_adapter_images=(picture,))
    for file in sorted((folder / LORAS).glob("*.safetensors")):
        requests[f"the LoRA {file.stem}"] = replace(plain, loras=(Lora(file),))
    made = {"the weights": picture} | {name: cascade.generate(one)[0] for name, one in requests.items()}
    for name, one in made.items():
        if all(low == high for low, high in one.getextrema()):
            raise TrainingError(f"A picture by {name} has one colour only.")
