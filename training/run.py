"""Trains one stage from a configuration file: ``python -m training.run CONFIG STAGE --data DATA --output FOLDER``.

DATA is a folder of pictures, each with its caption in a text file of the same name, or a path that the configuration's
``[data] source`` reads (`training.sources`). FOLDER gets a sub-folder for each stage (checkpoints, samples, TensorBoard logs, a
record, and at the end a file ``finished``) and ``model``, the model folder that grows with every stage. `training.stages` says
which stage needs which. ``accelerate launch -m training.run ...`` runs the same call on several processes.
"""

import argparse
import gc
import logging
import math
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # imports make a million objects and next to no garbage; looking for it took 0.8 s of 6

import torch

from cascade.weights.writing import save_component
from training import command
from training.agreement import check_agreement
from training.ahead import compile_step
from training.configuration import read_configuration
from training.errors import writing
from training.files import write_components
from training.options import Options
from training.processes import start_processes
from training.stages import ORDER, STAGES, check_needs
from training.tasks.tokenizer import train_tokenizer
from training.trainer import fit
from training.weights.checkpoint import has_checkpoint
from training.workshop import Workshop, load_component

logger = logging.getLogger(__name__)

FINISHED = "finished"


def round_components(model: Path, stage: str) -> None:
    """Stores the components that a finished stage has trained in bfloat16, as a shipped model folder has them.

    So later stages learn from the networks that will be shipped, and what is finished takes half the space.

    Raises:
        TrainingError: a component cannot be read or written.
    """
    networks = {component: load_component(model, component) for component in STAGES[stage].trains}

    def write(folder: Path) -> None:
        for component, network in networks.items():
            save_component(folder / component, network, torch.bfloat16)

    with writing(model):
        write_components(model, stage, write)


def train(
    config_file: Path, stage: str, data: Path, output: Path, *, deadline: float = math.inf, steps: int | None = None
) -> bool:
    """Trains one stage.

    Args:
        config_file: the configuration.
        stage: a name in `ORDER`.
        data: a folder of pictures with captions, or a path that the configuration's source reads.
        output: the training's folder.
        deadline: wall-clock time (`time.time`) at which to save and stop.
        steps: number of steps instead of the configuration's; warm-up and decay keep their shares of them.

    Returns:
        Whether the stage is finished; otherwise the next call continues it.

    Raises:
        TrainingError: the configuration, the data or the model folder is wrong.
        Stopped: Ctrl-C or SIGTERM came.
    """
    began = time.time()
    config = read_configuration(config_file)
    model, folder = output / "model", output / stage
    check_agreement(config, model, stage)
    check_needs(stage, model)
    state = start_processes()
    shop = Workshop(config, data, output, state.device)
    with state.main_process_first():
        shop.check_data()
    if stage == "tokenizer":
        if state.is_main_process:
            tokenizer = train_tokenizer(shop.source().captions(), config["tokenizer"]["vocabulary"])
            with writing(model):
                write_components(model, stage, lambda made: tokenizer.save_pretrained(made / "tokenizer"))
            logger.info("tokenizer: %d tokens", len(tokenizer))
        finished = True
    else:
        options = Options(**config[stage]["options"])
        if steps is not None:
            options = options.scaled(steps)
        task = shop.build(stage, options, resumes=has_checkpoint(folder))
        if state.is_main_process:
            logger.info(
                "%s: %.2f M parameters, %d steps of %d, on %d pictures and %d held-out ones",
                stage,
                sum(parameter.numel() for parameter in task.parameters()) / 1e6,
                options.steps,
                options.samples(state.num_processes),
                len(task.dataset),
                len(task.unseen),
            )
        finished = fit(task, options, folder, model, deadline=deadline, began=began)
    if finished and state.is_main_process:
        if stage != "tokenizer" and not STAGES[stage].adapts:
            round_components(model, stage)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).touch()
    return finished


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.run", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="a TOML file, such as miniature/mini.toml")
    parser.add_argument("stage", choices=ORDER)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder of pictures with captions, or a path that the configuration's source reads",
    )
    parser.add_argument("--output", type=Path, required=True, help="the training's folder")
    command.add_minutes(parser)
    command.add_steps(parser)
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="only compile the stage's step, with untrained networks where trained ones are missing; torch keeps the kernels, "
        "nothing else is written",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    options = parse(arguments)
    deadline = time.time() + 60 * options.minutes

    def work() -> None:
        if options.compile_only:
            compile_step(options.config, options.stage, options.data, options.output)
            return
        finished = train(
            options.config, options.stage, options.data, options.output, deadline=deadline, steps=options.steps
        )
        if not finished:
            logger.info("%s: stopped at the time limit; call again to go on", options.stage)

    return command.run(work, options.stage)


if __name__ == "__main__":
    gc.freeze()  # so that Python looks for no garbage in everything that was imported; as it ends, that took 1.3 s
    gc.enable()
    sys.exit(main())
