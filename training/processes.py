"""The processes that train, or encode, together."""

import logging
import os

import torch
from accelerate import PartialState

logger = logging.getLogger(__name__)


def start_processes() -> PartialState:
    """Joins the processes that work together, if there are several. Further calls return the same.

    Without a GPU, accelerate does that only if ``cpu`` is set.
    """
    joined = PartialState._shared_state != {}
    state = PartialState(cpu=not torch.cuda.is_available())
    # accelerate's launcher sets MASTER_ADDR for several processes, but starts only one without GPUs and MPI.
    if not joined and state.num_processes == 1 and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "Only one process runs: without GPUs, accelerate launch starts no more. To start several on CPUs, write "
            "python -m torch.distributed.run --standalone --nproc_per_node 2 in place of accelerate launch and its options."
        )
    return state
