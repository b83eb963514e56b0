"""Random draws that can be repeated: the generator of each micro-batch, and a random state that a block leaves as it was."""

import contextlib
from collections.abc import Iterator

import torch


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The generator of one micro-batch; its seed mixes the three numbers so that neighbours do not overlap."""
    mixed = (seed * 1_000_003 + step) * 4099 + rank
    return torch.Generator(device).manual_seed(mixed % 2**63)


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random state after the block, so that what the block draws does not change training."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
