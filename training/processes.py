"""The processes that train together."""

import logging
import os

import torch
from accelerate import PartialState

logger = logging.getLogger(__name__)


def start_processes() -> PartialState:
    """Joins the processes that train together, if there are several.

    Without a GPU, accelerate does that only if ``cpu`` is set.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    # accelerate's launcher sets MASTER_ADDR for several processes, but starts only one without GPUs and MPI.
    if state.num_processes == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "One process trains: without GPUs, accelerate launch starts no more. To start several on CPUs, use "
            "python -m torch.distributed.run --standalone --nproc_per_node 2 -m training.run ..."
        )
    return state
