"""What one stage of training learns, as the training loop sees it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cascade.networks.unet import TIMESTEP_CONDITIONS, StableCascadeUNet
from training.objective import LossWeight
from training.randomness import step_generator

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Times at which `DiffusionTask.error_of` measures the error."""


def draws(network: nn.Module) -> bool:
    """Whether it has dropout, in its present mode."""
    return any(isinstance(one, nn.Dropout) and one.training and one.p > 0 for one in network.modules())


def frozen(**networks: nn.Module) -> dict[str, nn.Module]:
    """Networks that a task uses and does not train: in evaluation mode, without gradients, in channels_last."""
    return {
        name: network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        for name, network in networks.items()
    }


def fix_constant_conditions(network: StableCascadeUNet) -> StableCascadeUNet:
    """Leaves the weights of the timestep conditions "sca" and "crp" as they are; returns the network.

    In training both are 0, whose embedding is 32 zeros and 32 ones. So such a mapper is a constant, for which that of the
    timestep has a bias, and its 32 weights for a channel have the same gradient. Adam moves each by the learning rate, and the
    constant 32 times as far. It scales the residual stream in every block: when the miniature's Stage C diverged, the two
    constants of the first block had grown to 6.2 each (root mean square), and the stream to 9 million.
    """
    mappers = network.timestep_mappers
    for name in () if mappers is None else mappers.names:
        if name in TIMESTEP_CONDITIONS:
            getattr(mappers, name).requires_grad_(False)
    return network


class Task(nn.Module, ABC):
    """The networks of one stage as sub-modules, and the loss as ``forward(**batch)``.

    Parameters that require gradients are trained. Networks that stay frozen are kept out of the module, in a plain dict.

    Attributes:
        dataset: the training pictures; None for a task that has no fixed number of pictures.
        unseen: held-out pictures, for `evaluate`.
        compiled_by: the option that let the task compile parts of its own; None if it has compiled none.
    """

    dataset: Sized | None = None
    unseen: Sized | None = None
    compiled_by: str | None = None

    @abstractmethod
    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The ``index``-th micro-batch of ``size`` samples; ``generator``, on the training device, is seeded for it alone."""

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Tensors of a micro-batch by name. ``loss`` is minimised; it and all other scalars are logged."""

    def units(self) -> Sequence[nn.Module]:
        """The modules whose parameters are gathered together in a sharded training (option ``sharded``), inner ones first.

        A unit's forward uses no other unit's parameters, and only it uses its own. All other parameters are one more unit.
        """
        return ()

    def repeats(self) -> bool:
        """Whether a forward of the same batch computes the same, compiled or not: compiled dropout draws other masks."""
        return not draws(self)

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Updates state that has no gradient, such as an adaptive loss weight; called after every micro-batch."""

    @abstractmethod
    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Figures to log, and a sheet of pictures or None; called with the averaged weights, in evaluation mode, without
        gradients.

        If the training is sharded, all processes call it, and networks must run through this task's forward.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes each trained component to its own sub-folder of ``folder``.

        If the training is sharded, all processes call it, and the first one writes (`weights.fsdp.whole`).
        """


class DiffusionTask(Task):
    """A task whose batches have ``timesteps`` (B,), and whose outputs have ``errors`` (B,), by which the loss weight may change.

    Attributes:
        weight: see `objective.loss_weight`.
    """

    weight: LossWeight

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.weight.update(batch["timesteps"], outputs["errors"])

    def error_of(self, batches: Iterable[dict[str, Tensor]]) -> float:
        """The mean error at five times, with the same noise at every call.

        Args:
            batches: the arguments of ``forward`` other than ``timesteps`` and ``noise``; all have ``latents`` (B, C, h, w).
        """
        errors = []
        for batch in batches:
            latents = batch["latents"]
            for place, time in enumerate(TIMESTEPS):
                generator = step_generator(0, place, 0, latents.device)
                noise = torch.randn(latents.shape, generator=generator, device=latents.device)
                times = torch.full((len(latents),), time, device=latents.device)
                errors.append(self(**batch, timesteps=times, noise=noise)["errors"])
        return torch.cat(errors).mean().item()
