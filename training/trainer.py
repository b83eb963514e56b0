"""The training loop that every stage shares.

A :class:`Task` says what a step learns from; :func:`fit` runs it through accelerate: mixed precision, gradient accumulation
and clipping, any number of processes, EMA, progress bar, TensorBoard, evaluation, and checkpoints that resume exactly.
Exactness rests on one rule: what a step sees is a function of the seed, the step and the process, never of what came before.
"""

import contextlib
import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import Checkpoint, Progress
from training.dataset import Dataset
from training.earlier_checkpoints import accept_earlier_checkpoints
from training.errors import TrainingError, writing
from training.files import write_components
from training.interruption import Interruption, Stopped
from training.options import Options, compiles, learning_rate_factor

logger = logging.getLogger(__name__)

STATISTICS_BATCHES = 40
"""Batches that running statistics are measured on; of few pictures, as many as show each one twice."""
FEW_PICTURES = 16
"""An evaluation of fewer held-out pictures says little, and its log line says so."""
AGREE_EVERY = 16
"""Steps after which several processes agree on whether to save or to stop. Their clocks and signals differ."""


class Task(nn.Module, ABC):
    """One stage's training: the trained networks as sub-modules, and the loss as ``forward(**batch)``.

    Attributes:
        dataset: what it learns from, if that has an end.
        unseen: the held-out pictures that `evaluate` looks at.
    """

    dataset: Dataset | None = None
    unseen: Dataset | None = None

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
        """Writes each trained component to its sub-folder of ``folder``."""


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


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Whatever the block draws, training goes on with the random numbers that it would have had without it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def statistics_batches(task: Task, options: Options) -> int:
    """How many batches the running statistics are measured on."""
    if task.dataset is None:
        return STATISTICS_BATCHES
    return min(STATISTICS_BATCHES, max(4, math.ceil(2 * len(task.dataset) / options.batch_size)))


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

    Raises:
        Stopped: Ctrl-C or SIGTERM came; a checkpoint was saved.
        TrainingError: the checkpoint does not fit, the weights are no longer finite, or something could not be written.
    """
    on_gpu = torch.cuda.is_available()
    compiled = compiles(options, torch.device("cuda" if on_gpu else "cpu"))
    if not compiled and options.compile:
        logger.info("%s: not compiled, because there is no GPU.", folder.name)
    accelerator = Accelerator(
        mixed_precision=options.precision if on_gpu else "no",
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # CUDA graphs: the miniature's steps are bound by launches (Stage B, batch 256: 33 ms of kernels in a step of 74 ms).
        # Sizes are constants: inductor fails on these networks with dynamic ones (torch 2.13).
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if compiled else "no", mode="reduce-overhead", dynamic=False
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
    with writing(folder):
        accelerator.init_trackers(folder.name)
    checkpoint = Checkpoint(accelerator, folder)
    if checkpoint.load():
        ema.to(accelerator.device)
        logger.info("%s: resumed at step %d", folder.name, progress.step)

    def batch_at(index: int) -> dict[str, Tensor]:
        generator = step_generator(options.seed, index, accelerator.process_index, accelerator.device)
        batch = task.batch(index, options.batch_size, generator)
        return {name: channels_last(value) for name, value in batch.items()}

    def review() -> None:
        ema.store(trained)
        ema.copy_to(trained)
        if accelerator.is_main_process:
            with torch.no_grad(), accelerator.autocast(), same_random_state(accelerator.device):
                refresh_statistics(task, map(batch_at, range(statistics_batches(task, options))))
                task.eval()
                figures, picture = task.evaluate()
            accelerator.log(figures, step=progress.step)
            few = figures and task.unseen is not None and len(task.unseen) < FEW_PICTURES
            note = f" (of {len(task.unseen)} held-out pictures: too few to tell much)" if few else ""
            logger.info("%s: step %d %s%s", folder.name, progress.step, figures, note)
            with writing(folder / "samples"):
                (folder / "samples").mkdir(parents=True, exist_ok=True)
                picture.save(folder / "samples" / f"{progress.step:06d}.png")
            with writing(model):
                write_components(model, folder.name, task.save)
        task.train()
        ema.restore(trained)
        accelerator.wait_for_everyone()

    def save() -> None:
        if not all(parameter.isfinite().all() for parameter in trained):
            raise TrainingError(
                f"{folder.name}: the weights are infinite or no numbers (NaN) at step {progress.step}; nothing of that is "
                f"saved. The learning_rate, {options.learning_rate}, may be too large."
            )
        checkpoint.save()

    def agreed(*wishes: bool) -> list[bool]:
        """What any process wishes. All must save and stop at the same step, or they wait for one another for ever."""
        if accelerator.num_processes == 1:
            return list(wishes)
        values = torch.tensor(wishes, dtype=torch.float32, device=accelerator.device)
        return (accelerator.reduce(values) > 0).tolist()

    saved = time.time()
    first = progress.step
    log_every = max(1, min(100, options.steps // 50))
    bar = tqdm(
        total=options.steps,
        initial=progress.step,
        desc=folder.name,
        mininterval=10,
        disable=not accelerator.is_main_process,
    )
    network.train()
    compiled_shapes = shapes(batch_at(0)) if compiled else None
    with Interruption() as interruption, contextlib.closing(bar):
        while progress.step < options.steps:
            if accelerator.num_processes == 1 or progress.step == first or progress.step % AGREE_EVERY == 0:
                interrupted, late, due = agreed(
                    interruption.signal is not None,
                    time.time() >= deadline,
                    time.time() - saved > options.checkpoint_seconds,
                )
                if interrupted:
                    save()
                    raise Stopped(interruption.signal or signal.SIGTERM, progress.step)
                if late:
                    break
                if due and progress.step > first:
                    save()
                    saved = time.time()
            factor = learning_rate_factor(progress.step, options)
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * factor
            for part in range(options.accumulate):
                batch = batch_at(progress.step * options.accumulate + part)
                # Pictures of other sizes are rare: compiling for one takes as long as thousands of steps (60 to 100 s on an
                # H100).
                stance = "default" if shapes(batch) == compiled_shapes else "force_eager"
                # Gradients of several processes are averaged once a step, with its last micro-batch.
                last = part == options.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(network):
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
            if progress.step % log_every == 0:
                figures = {name: value.item() for name, value in outputs.items() if value.ndim == 0}
                bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
                accelerator.log({**figures, "learning_rate": options.learning_rate * factor}, step=progress.step)
            if progress.step % options.evaluate_every == 0 and progress.step < options.steps:
                # First the checkpoint: after a kill, training must not begin with the components that it wrote itself.
                save()
                saved = time.time()
                review()
    save()
    review()
    accelerator.end_training()
    return progress.step >= options.steps
