"""Distillation: an adapter of Stage C or B with which few steps without guidance do what the teacher does in many with it.

The teacher is the stage's own network. Without noise (DDIM), its steps lead from each initial noise along one path to one
result, so the student can be trained by regression: from each point at which it will take a step to the point of the path at
which that step ends. This is progressive distillation (Salimans and Ho, arXiv 2202.00512) to the last number of steps at once;
the guidance is learned with it (Meng et al., arXiv 2210.03142). Consistency distillation would also learn all points between,
which no sampler asks for.

The paths are sampled once, by the engine's own steps, and kept. A share of the micro-batches starts where the student's own
earlier steps lead instead of on the path, so that it learns to return to it.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import SAMPLERS, Noise, Step, alpha_sigma, ddim_step, finish, log_snr, timestep
from cascade.sizes import Size
from cascade.speeds import SPEEDS
from cascade.weights import StageSettings
from training.dataset import Dataset
from training.latents import TextTable
from training.lora.adapters import adapted_layers, add_lora, linear_layers
from training.objective import AdaptiveLossWeight
from training.pictures import grid
from training.randomness import step_generator
from training.shapes import Shapes
from training.task import Task, frozen
from training.values import Range

FILE = "turbo.safetensors"
LOOKED_AT = 64
"""Held-out pictures of an evaluation."""

Rank = Annotated[int, Range(1, 512)]


class Distillation(Task):
    """Squared errors of the student's steps, each step's relative to its own running mean, so that all steps count alike.

    Args:
        network: "prior" or "decoder".
        teacher: the network.
        text_encoder: encodes the captions.
        with_tokens: whether the captions' hidden states are needed, besides their pooled embeddings.
        settings: the teacher's, of which guidance, rescale and shift count. The student's are those of the speed "turbo".
        rank: of the adapter.
        paths: number of paths; path i is that of the picture i modulo their number, with the noise of seed i.
        substeps: steps of the teacher in one of the student's.
        own: share of the micro-batches that start where the student's own steps lead.
    """

    def __init__(
        self,
        network: str,
        teacher: StableCascadeUNet,
        *,
        text_encoder: CLIPTextModelWithProjection,
        with_tokens: bool,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        settings: StageSettings,
        rank: int,
        paths: int,
        substeps: int,
        own: float,
    ) -> None:
        super().__init__()
        self.network, self.shapes, self.substeps, self.own = network, shapes, substeps, own
        self.dataset, self.unseen = dataset, unseen
        self.turbo = replace(settings, **getattr(SPEEDS["turbo"], network))
        self.many = replace(settings, steps=substeps * self.turbo.steps, sampler=self.turbo.sampler)
        student = copy.deepcopy(teacher)
        trained = add_lora(student, linear_layers(student), rank=rank, alpha=rank)
        # Not sub-modules of the task: checkpoints hold the adapter only.
        self.trained = nn.ParameterDict({name.replace(".", "/"): value for name, value in trained.items()})
        self.networks = {**frozen(teacher=teacher), "student": student.eval().to(memory_format=torch.channels_last)}
        times = SAMPLERS[self.turbo.sampler].times(self.turbo.steps, 1.0)
        self.register_buffer("log_snrs", log_snr(times, settings.shift), persistent=False)
        self.weight = AdaptiveLossWeight()
        with torch.no_grad(), torch.autocast(dataset.device.type, torch.bfloat16, enabled=self._on_gpu):
            self.texts = {
                one: TextTable(one, text_encoder.eval(), with_tokens=with_tokens) for one in (dataset, unseen)
            }
        self._paths, self._numbers = {}, shapes.split(paths)

    @property
    def _on_gpu(self) -> bool:
        return self.dataset.device.type == "cuda"

    @abstractmethod
    def known(self, dataset: Dataset, pictures: Tensor, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
        """What is kept of pictures (B,) for their paths, each tensor (B, ...)."""

    @abstractmethod
    def conditions(self, dataset: Dataset, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's arguments, float32, from what is kept."""

    @abstractmethod
    def steps(
        self,
        network: StableCascadeUNet,
        conditions: Mapping[str, Tensor],
        size: Size,
        noise: Noise,
        settings: StageSettings,
    ) -> Iterator[Step]:
        """Samples pictures of a size."""

    @abstractmethod
    def shown(self, latents: Tensor) -> Tensor:
        """Latents as pictures (B, 3, H, W) in 0..1."""

    def _path(self, conditions: Mapping[str, Tensor], size: Size, seeds: Sequence[int]) -> Tensor:
        """The teacher's points at the times of the student's steps, the noise first: float32 (B, steps + 1, C, h, w)."""
        taken = self.steps(self.networks["teacher"], conditions, size, Noise(seeds, self.dataset.device), self.many)
        points = [step.x for step in taken][self.substeps - 1 :: self.substeps]
        return torch.stack([Noise(seeds, self.dataset.device)(*points[0].shape[1:]), *points], dim=1)

    @torch.no_grad()
    def paths(self, size: Size, at_once: int) -> dict[str, Tensor]:
        """What is kept of each path of a size, and its points, float16 (N, steps + 1, C, h, w).

        The first call samples them, ``at_once`` together. Not in bfloat16, because the first step of Stage C multiplies the
        prediction's error by a hundred.
        """
        if size not in self._paths:
            numbers, parts = self._numbers[size], []
            for first in range(numbers.start, numbers.stop, at_once):
                some = range(first, min(first + at_once, numbers.stop))
                generator = step_generator(0, first, 0, self.dataset.device)
                known = self.known(self.dataset, torch.tensor(some) % len(self.dataset), size, generator)
                points = self._path(self.conditions(self.dataset, known), size, some)
                parts.append({**known, "points": points.half()})
            self._paths[size] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return self._paths[size]

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All steps of as many paths as make ``size`` samples, at least one."""
        shape, steps = self.shapes.at(index), self.turbo.steps
        samples = self.shapes.batch_size(shape, size)
        paths, count = self.paths(shape, samples), max(1, samples // steps)
        chosen = torch.randint(len(paths["points"]), (count,), generator=generator, device=generator.device)
        drawn = {name: value[chosen] for name, value in paths.items()}
        points = drawn.pop("points").float()
        conditions = self.conditions(self.dataset, drawn)
        starts = points[:, :-1]
        share = torch.rand((), generator=torch.Generator().manual_seed(generator.initial_seed())).item()
        if share < self.own:
            starts = self._rollout(points[:, 0], conditions)
        return {
            "start": starts.flatten(0, 1),
            "end": points[:, 1:].flatten(0, 1),
            "step": torch.arange(steps, device=points.device).repeat(count),
            **{name: value.repeat_interleave(steps, 0) for name, value in conditions.items()},
        }

    @torch.no_grad()
    def _rollout(self, x: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Where the student's steps from ``x`` (B, C, h, w) start, (B, steps, C, h, w)."""
        points = [x]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._on_gpu):
            for step in range(self.turbo.steps - 1):
                at = torch.full((len(x),), step, device=x.device)
                points.append(self._taken(points[-1], at, conditions))
        return torch.stack(points, dim=1)

    def _taken(self, x: Tensor, step: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Where the student's ``step`` (B,) from ``x`` ends, float32 (B, C, h, w)."""
        now, then = (self.log_snrs[at].view(-1, 1, 1, 1) for at in (step, step + 1))
        epsilon = self.networks["student"](x, timestep(now.flatten()), **conditions).float()
        alpha, sigma = alpha_sigma(now)
        return ddim_step(x, (x - sigma * epsilon) / alpha, epsilon, now, then, x)

    def forward(self, start: Tensor, end: Tensor, step: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        """``start`` and ``end`` of the steps (B, C, h, w); ``step`` (B,), int64; the network's conditions (B, ...)."""
        errors = (self._taken(start, step, conditions) - end).square().mean(dim=(1, 2, 3))
        weights = self.weight(timestep(self.log_snrs[step]))
        return {"loss": (errors * weights).mean(), "errors": errors.detach(), "error": errors.mean().detach()}

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        self.weight.update(timestep(self.log_snrs[batch["step"]]), outputs["errors"])

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Distances to the teacher's latents from the same noise, relative to their size: the student's (``distance``), and those
        of the teacher in as few steps, with its guidance (``distance_without``). Rows: teacher, student, teacher in few steps.
        """
        pictures, size = torch.arange(min(LOOKED_AT, len(self.unseen))), self.unseen.size
        device = self.unseen.device
        known = self.known(self.unseen, pictures, size, step_generator(0, 0, 0, device))
        conditions = self.conditions(self.unseen, known)
        few = replace(self.many, steps=self.turbo.steps)
        true, student, without = (
            finish(self.steps(self.networks[name], conditions, size, Noise(range(len(pictures)), device), settings))
            for name, settings in (("teacher", self.many), ("student", self.turbo), ("teacher", few))
        )
        figures = {
            name: ((made - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)).mean().item()
            for name, made in (("distance", student), ("distance_without", without))
        }
        return figures, grid([self.shown(made[:8]) for made in (true, student, without)])

    def save(self, folder: Path) -> None:
        """Writes the adapter into the folder ``turbo_`` and the network's name."""
        target = folder / f"turbo_{self.network}"
        target.mkdir()
        # Not by save_file, because only the owner can read its files.
        (target / FILE).write_bytes(safetensors.torch.save(file_tensors(self.network, self.networks["student"])))


def file_tensors(name: str, network: nn.Module) -> dict[str, Tensor]:
    """A network's adapter as it is stored: float16, on the CPU, with diffusers' names. name: of the network."""
    return {
        f"{name}.{one.layer}.{part}.weight": matrix.to("cpu", torch.float16).contiguous()
        for one in adapted_layers(network)
        for part, matrix in (("lora_A", one.down), ("lora_B", one.up))
    }
