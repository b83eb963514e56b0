"""The command line of ``scripts/self-test``: makes pictures, checks them, and writes a report and a sheet."""

import argparse
import itertools
import logging
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.running.device import ADDS
from cascade.running.errors import is_out_of_memory
from cascade.running.placement import MODES
from cascade.sampling import SAMPLERS
from cascade.weights import WeightsError
from miniature.sheets import sheet
from serving.early import find_weights
from serving.peak_memory import peak_memory, reset_peak_memory
from serving.record import versions

PROMPTS = (
    "a red apple on a green background",
    "a blue cup beside a yellow book",
    "a photograph of a lighthouse at sunset",
    "a cat's face, an oil painting",
    "a snowy mountain behind a lake",
)
SEED = 1
# Share of values that are 0 or 255. The miniature's drawings on white have up to 0.85, so this finds only broken ones.
MOST_SATURATED = 0.98
# Mean difference of two pictures, of 255. The miniature's pictures of these prompts differ by 16 and more.
LEAST_DIFFERENCE = 5.0
# Correlation of horizontally neighbouring pixels. White noise has 0, the miniature's pictures have 0.99.
LEAST_SMOOTHNESS = 0.5
# Mean difference of the same picture in two memory modes, of 255: allows for bfloat16's rounding.
MOST_BETWEEN_MODES = 1.0


@dataclass(frozen=True)
class Trial:
    """One picture that was made.

    Attributes:
        name: prompt, sampler or memory mode.
        image: the picture.
        seconds: time to make it.
        peak: bytes, see `peak_memory`.
    """

    name: str
    image: Image.Image
    seconds: float
    peak: int

    def __str__(self) -> str:
        return f"{self.name}: {self.seconds:.2f} s, peak {self.peak / 1e9:.2f} GB"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of two pictures of the same size, of 255."""
    return float(np.abs(pixels(first) - pixels(second)).mean())


def problems_of(trial: Trial) -> Iterator[str]:
    """What is wrong with a single picture, as sentences."""
    values = pixels(trial.image)
    saturated = float(((values == 0) | (values == 255)).mean())
    if saturated > MOST_SATURATED:
        yield f"{trial.name}: {saturated:.0%} of the values are 0 or 255; at most {MOST_SATURATED:.0%} are expected."
        return
    left, right = values[:, :-1].ravel(), values[:, 1:].ravel()
    # NaN for a single colour.
    with np.errstate(invalid="ignore"):
        smoothness = float(np.corrcoef(left, right)[0, 1])
    if not smoothness > LEAST_SMOOTHNESS:
        yield f"{trial.name}: neighbours correlate by {smoothness:.2f}, like noise; at least {LEAST_SMOOTHNESS} is expected."


def problems_between(trials: list[Trial]) -> Iterator[str]:
    """Pairs of pictures that are too similar for their different prompts, as sentences."""
    for one, other in itertools.combinations(trials, 2):
        found = difference(one.image, other.image)
        if found < LEAST_DIFFERENCE:
            yield (
                f"{one.name} and {other.name} differ by {found:.1f} of 255 in the mean; at least {LEAST_DIFFERENCE} "
                "is expected of two prompts."
            )


def attempt(cascade: Cascade, name: str, request: Request) -> Trial:
    """Make one picture, and measure time and memory."""
    reset_peak_memory(cascade.device)
    start = time.perf_counter()
    (image,) = cascade.generate(request)
    return Trial(name, image, time.perf_counter() - start, peak_memory(cascade.device))


def self_test(weights: Path) -> tuple[list[str], list[Trial], list[str]]:
    """Make and check the pictures.

    Returns:
        Lines of the report, the trials, and problems as sentences.

    Raises:
        WeightsError: the weights are missing or damaged.
    """
    start = time.perf_counter()
    cascade = Cascade.load(weights)
    dtype = str(cascade.prior.dtype).removeprefix("torch.")
    dtype += ADDS[cascade.precision]
    lines = [
        f"Model: {weights.name}; loaded in {time.perf_counter() - start:.1f} s.",
        f"Device: {device_name(cascade.device)}, {dtype}, {cascade.runner.description}.",
        f"System: {platform.platform()}, Python {platform.python_version()}.",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}.",
    ]
    trials = [attempt(cascade, repr(prompt), Request(prompt, seed=SEED)) for prompt in PROMPTS]
    problems = list(problems_between(trials))
    # Again, because the first picture compiles kernels and captures graphs.
    trials[0] = attempt(cascade, repr(PROMPTS[0]), Request(PROMPTS[0], seed=SEED))
    for sampler in SAMPLERS:
        if sampler != "ddpm":
            trials.append(attempt(cascade, f"sampler {sampler}", Request(PROMPTS[0], seed=SEED, sampler=sampler)))
    mode = cascade.runner.mode
    on_gpu = cascade.device.type == "cuda"
    del cascade
    for other in MODES if on_gpu else ():
        if other not in ("auto", mode):
            try:
                trials.append(
                    attempt(Cascade.load(weights, memory=other), f"memory {other}", Request(PROMPTS[0], seed=SEED))
                )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                lines.append(f"memory {other}: does not fit.")
                continue
            found = difference(trials[0].image, trials[-1].image)
            if found > MOST_BETWEEN_MODES:
                problems.append(
                    f"In memory mode {other}, the picture differs by {found:.1f} of 255 from that in {mode}."
                )
    for trial in trials:
        problems += problems_of(trial)
    return [*lines, *map(str, trials)], trials, problems


def device_name(device: torch.device) -> str:
    """As in "NVIDIA H100, 79 GiB", "cpu with 16 threads"."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return f"{device.type} with {torch.get_num_threads()} threads"


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/self-test", description="Test a model on this machine.")
    parser.add_argument("--weights", type=Path, help="model folder (default: the published model, else the miniature)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("self-test"), help="folder for the report (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        lines, trials, problems = self_test(options.weights or find_weights())
    except (WeightsError, ValueError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    verdict = [f"Failed: {problem}" for problem in problems] or ["All checks passed."]
    text = "\n".join([*lines, *verdict])
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "self-test.txt").write_text(f"{text}\n", encoding="utf-8")
    sheet([trial.image for trial in trials], 4, [trial.name for trial in trials]).save(options.output / "self-test.png")
    sys.stdout.write(f"{text}\nWritten: {options.output / 'self-test.txt'}, {options.output / 'self-test.png'}\n")
    return 1 if problems else 0
