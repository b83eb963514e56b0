"""Trains one stage from a configuration file: ``python -m training.run CONFIG STAGE --data DATA --output FOLDER``.

DATA is a folder of pictures, each with its caption in a text file of the same name, or what ``[data] source`` of the
configuration reads (`training.sources`). FOLDER gets one sub-folder a stage (checkpoints, samples, TensorBoard logs, and at the
end a file ``finished``) and ``model``, the model folder that grows with every stage. What a stage needs of earlier ones:
`training.stages`. Every figure comes from the configuration; under ``accelerate launch -m training.run ...`` the same call runs
on several processes.
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from training.agreement import check_agreement
from training.checkpoint import has_checkpoint
from training.configuration import read_configuration
from training.errors import TrainingError, writing
from training.files import write_components
from training.interruption import Stopped
from training.options import Options
from training.stages import ORDER, STAGES, check_needs
from training.tasks.tokenizer import train_tokenizer
from training.trainer import fit
from training.workshop import Workshop

logger = logging.getLogger(__name__)

FINISHED = "finished"

__all__ = ["FINISHED", "ORDER", "STAGES", "main", "train"]


def start_processes() -> PartialState:
    """This process's place among those that train together.

    Without a GPU, accelerate puts several processes together only where it is told that this is meant.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    # accelerate's launcher sets this for several processes; but without GPUs, and without MPI, it starts one.
    if state.num_processes == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "One process trains: without GPUs, accelerate launch starts no more. On CPUs, several are started by: "
            "python -m torch.distributed.run --standalone --nproc_per_node 2 -m training.run ..."
        )
    return state


def train(
    config_file: Path, stage: str, data: Path, output: Path, *, deadline: float = math.inf, steps: int | None = None
) -> bool:
    """Trains one stage.

    Args:
        config_file: the configuration.
        stage: a name in `ORDER`.
        data: a folder of pictures with captions, or what the configuration's source reads.
        output: the training's folder.
        deadline: wall-clock time at which to save and stop early.
        steps: instead of the configuration's; its schedule is scaled.

    Returns:
        Whether the stage is finished; otherwise a later call goes on.

    Raises:
        TrainingError: the configuration, the data or the model folder is wrong.
        Stopped: Ctrl-C or SIGTERM came.
    """
    config = read_configuration(config_file)
    model, folder = output / "model", output / stage
    check_agreement(config, model, stage)
    check_needs(stage, model)
    state = start_processes()
    shop = Workshop(config, data, output, state.device)
    with state.main_process_first():
        shop.check_data()
    if stage == "tokenizer":
        with writing(model):
            tokenizer = train_tokenizer(shop.source().captions(), config["tokenizer"]["vocabulary"])
            write_components(model, stage, lambda made: tokenizer.save_pretrained(made / "tokenizer"))
        logger.info("tokenizer: %d tokens", len(tokenizer))
        finished = True
    else:
        options = Options(**config[stage]["options"])
        if steps is not None:
            options = options.scaled(steps)
        task = shop.build(stage, options, resumes=has_checkpoint(folder))
        trained = sum(parameter.numel() for parameter in task.parameters())
        logger.info(
            "%s: %.2f M parameters, %d steps of %d, on %d pictures and %d held-out ones",
            stage,
            trained / 1e6,
            options.steps,
            options.batch_size,
            len(task.dataset),
            len(task.unseen),
        )
        finished = fit(task, options, folder, model, deadline=deadline)
    if finished and state.is_main_process:
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
        help="a folder of pictures with captions, or what the configuration's source reads",
    )
    parser.add_argument("--output", type=Path, required=True, help="the training's folder")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="save and stop after this long; call again to go on"
    )
    parser.add_argument(
        "--steps", type=int, help="instead of the configuration's; warm-up and decay are scaled with them"
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring. Returns the exit code."""
    options = parse(arguments)
    deadline = time.time() + 60 * options.minutes
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # it has six lines for every checkpoint
    try:
        finished = train(
            options.config, options.stage, options.data, options.output, deadline=deadline, steps=options.steps
        )
    except TrainingError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except Stopped as stopped:
        sys.stderr.write(f"{options.stage}: stopped and saved at step {stopped.step}; call again to go on.\n")
        return 128 + stopped.signal
    except KeyboardInterrupt:
        sys.stderr.write(f"{options.stage}: interrupted; what was saved before is there. Call again to go on.\n")
        return 130
    if not finished:
        logger.info("%s: stopped at the time limit; call again to go on", options.stage)
    return 0


if __name__ == "__main__":
    sys.exit(main())
