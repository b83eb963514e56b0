"""The training loop that every stage shares.

A :class:`Task` says what a step learns from; :func:`fit` runs it through accelerate: mixed precision, gradient accumulation
and clipping, any number of processes, EMA, progress bar, TensorBoard, evaluation, and checkpoints that resume exactly.
Exactness rests on one rule: what a step sees is a function of the seed, the step and the process, never of what came before.
"""

import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training.earlier_checkpoints import accept_earlier_checkpoints

logger = logging.getLogger(__name__)

STATISTICS_BATCHES = 40


@dataclass(frozen=True)
class Options:
    """How a stage is trained; one table of the configuration file.

    ``batch_size`` counts samples of the native size, of one process and one micro-batch. The learning rate rises over
    ``warmup`` steps, stays, and falls along a half cosine to nothing over the last ``decay`` steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 200
    decay: int = 0
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.999
    precision: str = "bf16"
    compile: bool = True
    evaluate_every: int = 5000
    checkpoint_seconds: float = 60.0
    seed: int = 0


class Task(nn.Module, ABC):
    """One stage's training: the trained networks as sub-modules, and the loss as ``forward(**batch)``."""

    @abstractmethod
    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The ``index``-th micro-batch; ``generator`` (on the training device) is seeded for it alone."""

    @abstractmethod
    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Scalars to log; ``loss`` among them is the one that is minimised."""

    def after_step(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """State outside the gradient that follows a step, such as an adaptive loss weight."""

    @abstractmethod
    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Figures and a picture that show how far training is; called with the averaged weights in place."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes each trained component to its sub-folder of the model folder ``folder``."""


def learning_rate_factor(step: int, options: Options) -> float:
    """Share of the full learning rate at ``step``: warm-up, plateau, half cosine."""
    factor = min(1.0, (step + 1) / max(1, options.warmup))
    left = options.steps - step
    if options.decay and left < options.decay:
        factor *= 0.5 * (1 - math.cos(math.pi * left / options.decay))
    return factor


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The generator of one micro-batch; its seed mixes the three numbers so that neighbours do not overlap."""
    mixed = (seed * 1_000_003 + step) * 4099 + rank
    return torch.Generator(device).manual_seed(mixed % 2**63)


def channels_last(value: Tensor) -> Tensor:
    """Pictures and latents in the layout that the networks work in: 17% off a compiled Stage B step on an H200."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def shapes(batch: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items()}


def refresh_statistics(task: Task, batches: Iterable[dict[str, Tensor]]) -> None:
    """Measures the running statistics of the task's batch normalisations anew, with the weights as they are.

    Statistics gathered along the way belong to the weights of the moment, not to their average: with the averaged ones, the
    miniature's semantic latents had a deviation of 0.73 instead of 1, and its previewer 18.4 dB instead of 28.8.
    """
    norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    task.train()
    for batch in batches:
        task(**batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


class Progress:
    """How many optimizer steps are done; saved with every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def fit(task: Task, options: Options, folder: Path, model: Path, *, deadline: float = math.inf) -> bool:
    """Trains ``task`` up to ``options.steps``; writes checkpoints and samples to ``folder``, the components to ``model``.

    Args:
        task: the networks and the loss.
        options: sizes and rates.
        folder: gets ``state`` (the checkpoint), ``samples`` and ``logs``; its name is the stage's name in every log line.
        model: the model folder; at every evaluation the trained components are written there, with the averaged weights.
        deadline: wall-clock time (``time.time()``) at which to save and stop early.

    Returns:
        True when the last step was reached, False when the deadline came first. A later call goes on where this one stopped,
        with the same result as if it had never stopped.
    """
    accelerator = Accelerator(
        mixed_precision=options.precision if torch.cuda.is_available() else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # CUDA graphs: the miniature's steps are bound by launches (Stage B, batch 256: 33 ms of kernels in a step of 74 ms).
        # Sizes are constants: inductor fails on these networks with dynamic ones (torch 2.13).
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if options.compile else "no", mode="reduce-overhead", dynamic=False
        ),
    )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    set_seed(options.seed)
    task.to(accelerator.device, memory_format=torch.channels_last)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=options.learning_rate,
        betas=(0.9, options.beta2),
        weight_decay=options.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    ema = EMAModel(trained, decay=options.ema, use_ema_warmup=True, power=0.75, foreach=True)
    accept_earlier_checkpoints(task, optimizer, ema)
    network, optimizer = accelerator.prepare(task, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, progress)
    accelerator.init_trackers(folder.name)
    state = folder / "state"
    if state.exists():
        accelerator.load_state(str(state))
        ema.to(accelerator.device)
        logger.info("%s: resumed at step %d", folder.name, progress.step)

    def checkpoint() -> None:
        # Every process writes a part of it.
        fresh = folder / "state.new"
        if accelerator.is_main_process:
            shutil.rmtree(fresh, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(fresh), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(state, ignore_errors=True)
            fresh.rename(state)
        accelerator.wait_for_everyone()

    def batch_at(index: int) -> dict[str, Tensor]:
        generator = step_generator(options.seed, index, accelerator.process_index, accelerator.device)
        batch = task.batch(index, options.batch_size, generator)
        return {name: channels_last(value) for name, value in batch.items()}

    def review() -> None:
        ema.store(trained)
        ema.copy_to(trained)
        if accelerator.is_main_process:
            with torch.no_grad(), accelerator.autocast():
                refresh_statistics(task, map(batch_at, range(STATISTICS_BATCHES)))
                task.eval()
                figures, picture = task.evaluate()
            accelerator.log(figures, step=progress.step)
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            picture.save(folder / "samples" / f"{progress.step:06d}.png")
            logger.info("%s: step %d %s", folder.name, progress.step, figures)
            task.save(model)
        task.train()
        ema.restore(trained)
        accelerator.wait_for_everyone()

    saved = time.time()
    bar = tqdm(
        total=options.steps,
        initial=progress.step,
        desc=folder.name,
        mininterval=10,
        disable=not accelerator.is_main_process,
    )
    network.train()
    compiled = shapes(batch_at(0)) if options.compile else None
    while progress.step < options.steps and time.time() < deadline:
        factor = learning_rate_factor(progress.step, options)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        for part in range(options.accumulate):
            batch = batch_at(progress.step * options.accumulate + part)
            # Pictures of other sizes are rare: compiling for one takes as long as thousands of steps (60 to 100 s on an H100).
            stance = "default" if shapes(batch) == compiled else "force_eager"
            torch.compiler.cudagraph_mark_step_begin()
            with accelerator.autocast(), torch.compiler.set_stance(stance):
                outputs = network(**batch)
            accelerator.backward(outputs["loss"] / options.accumulate)
            task.after_step(outputs, batch)
        accelerator.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(trained)
        progress.step += 1
        bar.update()
        if progress.step % 100 == 0:
            figures = {name: value.item() for name, value in outputs.items() if value.ndim == 0}
            bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
            accelerator.log({**figures, "learning_rate": options.learning_rate * factor}, step=progress.step)
        if progress.step % options.evaluate_every == 0 and progress.step < options.steps:
            review()
        if time.time() - saved > options.checkpoint_seconds:
            checkpoint()
            saved = time.time()
    bar.close()
    checkpoint()
    review()
    accelerator.end_training()
    return progress.step >= options.steps
