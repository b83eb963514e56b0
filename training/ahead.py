"""Compiles a stage's step ahead of the stage, so that the stage's own process finds the kernels in torch's cache.

torch keeps what it compiles (inductor's FX graphs and AOTAutograd's, by default in a folder of the user's that all processes
share). The keys hold the graph, the shapes and layouts of all tensors and the device's index, but no weights and no data. So
one step with untrained networks and few pictures is enough, if everything else is as in the stage: the same task and training
loop, batch size, precision and number of processes.
"""

import contextlib
import copy
import logging
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from cascade.sizes import Size
from cascade.weights.writing import save_component
from training.agreement import check_agreement, table_of
from training.configuration import read_configuration
from training.dataset import Dataset, Split
from training.errors import TrainingError, writing
from training.options import Options
from training.processes import start_processes
from training.stages import STAGES, advice, maker
from training.trainer import Trainer
from training.workshop import Workshop

logger = logging.getLogger(__name__)

PATHS = 32
"""Paths of a distillation. No shape depends on their number, and sampling them takes long."""


class First(Dataset):
    """The first pictures of a dataset, at most ``count``."""

    def __init__(self, whole: Dataset, count: int) -> None:
        self.whole = whole
        super().__init__(whole.captions[:count], whole.tokenizer, whole.size, whole.device, whole.names)

    def images(self, indices: Tensor, size: Size | None = None) -> Tensor:
        return self.whole.images(indices, size)

    def references(self, indices: Tensor) -> Tensor:
        return self.whole.references(indices)

    def same_subject(self, indices: Tensor) -> Tensor:
        return self.whole.same_subject(indices)

    def shown(self, indices: Tensor) -> Tensor:
        return self.whole.shown(indices)


class SmallWorkshop(Workshop):
    """Builds tasks with few pictures: a batch of them, because some tasks draw no picture twice (`Dataset.draw_different`)."""

    def __init__(
        self, config: Mapping[str, Any], data: Path, output: Path, device: torch.device, *, pictures: int
    ) -> None:
        super().__init__(config, data, output, device)
        self.most = pictures

    def dataset(self, split: Split, stage: str) -> Dataset:
        return First(super().dataset(split, stage), self.most)


def compile_step(config_file: Path, stage: str, data: Path, output: Path) -> None:
    """Trains one step of a stage with untrained networks in place of those that its training folder lacks, and keeps nothing.

    Args:
        config_file, data, output: as `run.train` has them. The tokenizer must be in the model folder.
        stage: a name in `STAGES`.

    Raises:
        TrainingError: the configuration, the data or the model folder is wrong.
    """
    began = time.time()
    config = copy.deepcopy(read_configuration(config_file))
    check_agreement(config, output / "model", stage)
    if stage not in STAGES:
        raise TrainingError(f"{stage} has no network that could be compiled.")
    if not (output / "model" / "tokenizer").is_dir():
        raise TrainingError(f"{output / 'model'} lacks the tokenizer: {advice(['tokenizer'])}.")
    options = Options(**config[stage]["options"])
    task = config[stage].get("task", {})
    if "paths" in task:
        task["paths"] = min(task["paths"], PATHS)
    state = start_processes()
    with scratch() as folder:
        shop = SmallWorkshop(config, data, folder, state.device, pictures=options.batch_size)
        complete(shop, stage, output / "model")
        built = shop.build(stage, options, resumes=False)
        trainer = Trainer(built, options, folder / stage, shop.model, began)
        trainer.weights.network.train()
        trainer.step()
        trainer.accelerator.end_training()
    logger.info("%s: the first step was taken ahead, after %.0f s", stage, time.time() - began)


def complete(shop: Workshop, stage: str, model: Path) -> None:
    """Makes the model folder of ``shop``: links to the components of ``model``, and untrained ones that a stage takes from
    earlier stages. These are stored as those stages store them, so that they are loaded in the same way.

    Raises:
        TrainingError: a component is missing, and the configuration does not describe it; or a file cannot be written.
    """
    with writing(shop.model):
        shop.model.mkdir()
        for one in model.iterdir():
            if not one.name.startswith("."):
                (shop.model / one.name).symlink_to(one.absolute())
        for component in (*STAGES[stage].needs, *STAGES[stage].trains):
            if maker(component) == stage or (shop.model / component).exists():
                continue
            if table_of(component) not in shop.config:
                raise TrainingError(f"{stage} needs {component}, and the configuration has no [{table_of(component)}].")
            save_component(shop.model / component, shop.network(component), torch.bfloat16)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that is removed also if Ctrl-C or SIGTERM comes. Those end the block by `SystemExit`, once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in before:
        signal.signal(number, end)
    try:
        with tempfile.TemporaryDirectory(prefix="compile-") as folder:
            yield Path(folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
