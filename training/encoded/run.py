"""One training of Stage C on encoded pictures."""

import logging
import math
import time
from pathlib import Path

import torch
from accelerate.utils import set_seed

from cascade.networks.unet import StableCascadeUNet
from cascade.weights import ModelFolder, WeightsError
from training.encoded.recipe import Recipe
from training.encoded.shards import EncodedPictures
from training.errors import TrainingError
from training.processes import start_processes
from training.tasks.encoded_stage_c import EncodedStageCTask
from training.trainer import fit

logger = logging.getLogger(__name__)

STATE = "training"
# The length of each embedding, and the setting of Stage C that must equal it.
WIDTHS = {
    "image": "clip_image_in_channels",
    "text": "clip_text_in_channels",
    "pooled": "clip_text_pooled_in_channels",
}


def train_stage_c(
    recipe: Recipe,
    encoded: Path,
    output: Path,
    *,
    weights: Path | None = None,
    lite: bool = False,
    steps: int | None = None,
    deadline: float = math.inf,
) -> bool:
    """Trains Stage C, or continues a training that was stopped.

    Args:
        recipe: the settings.
        encoded: a folder of encoded pictures, see `shards`.
        output: gets ``prior``, Stage C with the averaged weights in bfloat16, and in `STATE` checkpoints and logs.
        weights: a model folder whose Stage C is trained further; None: a new one is trained, with random weights.
        lite: of the published repositories, whether the smaller Stage C is taken.
        steps: number of steps instead of the recipe's; warm-up and decay keep their shares of them.
        deadline: wall-clock time (`time.time`) at which to save and stop.

    Returns:
        Whether the last step was reached. ``prior`` is there in both cases.

    Raises:
        TrainingError: the pictures, a setting or the model folder is wrong, or a file cannot be written.
        training.interruption.Stopped: Ctrl-C or SIGTERM came; a checkpoint has been saved.
    """
    began = time.time()
    state = start_processes()
    options = recipe.options if steps is None else recipe.options.scaled(steps)
    pictures = EncodedPictures(encoded, state.device)
    set_seed(options.seed)
    prior = new_prior(recipe, state.device) if weights is None else load_prior(weights, lite, state.device)
    for part, width in pictures.widths().items():
        if prior.config[WIDTHS[part]] != width:
            raise TrainingError(
                f"{encoded}: {part} embeddings have {width} numbers, and Stage C's {WIDTHS[part]} is "
                f"{prior.config[WIDTHS[part]]}; they must be equal."
            )
    task = EncodedStageCTask(prior.train(), pictures, **recipe.task)
    if state.is_main_process:
        logger.info(
            "Stage C: %.2f M parameters, %d steps of %d, on %d pictures and %d held-out ones",
            sum(parameter.numel() for parameter in task.parameters()) / 1e6,
            options.steps,
            options.samples(state.num_processes),
            len(pictures),
            pictures.held_out,
        )
    return fit(task, options, output / STATE, output, deadline=deadline, began=began)


def new_prior(recipe: Recipe, device: torch.device) -> StableCascadeUNet:
    """A Stage C with random weights, float32, made on the device: on a CPU, 3.6 billion take minutes."""
    with device:
        return StableCascadeUNet(**recipe.prior)


def load_prior(weights: Path, lite: bool, device: torch.device) -> StableCascadeUNet:
    """A model folder's Stage C, float32.

    Raises:
        TrainingError: it has none, or it is damaged.
    """
    try:
        folder = ModelFolder.open(weights, lite=("prior",) if lite else ())
        folder.require(("prior",))
        return folder.load_component("prior", device=device, dtype=torch.float32)
    except WeightsError as error:
        raise TrainingError(str(error)) from error
