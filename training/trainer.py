"""The training loop of every stage.

`fit` trains a `Task` through accelerate: mixed precision, gradient accumulation and clipping, several processes, which each have
all weights or a share of them (`sharding`), averaged weights (EMA), TensorBoard, evaluation, and checkpoints that resume exactly.
This is possible because the data of a step depends only on the seed, the step and the process.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, TorchDynamoPlugin, set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from training.checkpoint import Checkpoint, Progress
from training.earlier_checkpoints import accept_earlier_checkpoints
from training.errors import TrainingError, writing
from training.files import write_components
from training.interruption import Interruption, Stopped
from training.options import Options, compiles, learning_rate_factor
from training.record import Clock, Record, Session, timestamp
from training.sharded_checkpoint import ShardedCheckpoint
from training.sharding import clip, gather_once, local, reshard, shard, share_buffers
from training.statistics import refresh_statistics, statistics_batches
from training.task import Task

logger = logging.getLogger(__name__)

FEW_PICTURES = 16
"""Figures on fewer held-out pictures say little; the log line points that out."""
AGREE_EVERY = 16
"""Steps after which several processes agree on whether to save or to stop. Their clocks and signals differ."""


def fit(
    task: Task, options: Options, folder: Path, model: Path, *, deadline: float = math.inf, began: float | None = None
) -> bool:
    """Trains ``task`` up to ``options.steps``. A call that stopped early is continued by the next one, with the same result.

    Args:
        task: the networks and the loss.
        options: batch size, steps, learning rate and so on.
        folder: gets ``state`` (the checkpoint), ``samples``, ``logs`` and ``record.json``; its name is the stage's name.
        model: the model folder. At every evaluation the trained components are written there, with the averaged weights.
        deadline: wall-clock time (`time.time`) at which to save, evaluate and stop.
        began: wall-clock time at which the preparations of this call began; None: now. For the record.

    Returns:
        Whether the last step was reached.

    Raises:
        Stopped: Ctrl-C or SIGTERM came; a checkpoint has been saved.
        TrainingError: the checkpoint does not fit, the weights are no longer finite, or a file cannot be written.
    """
    return Trainer(task, options, folder, model, time.time() if began is None else began).run(deadline)


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The generator of one micro-batch; its seed mixes the three numbers so that neighbours do not overlap."""
    mixed = (seed * 1_000_003 + step) * 4099 + rank
    return torch.Generator(device).manual_seed(mixed % 2**63)


def to_channels_last(value: Tensor) -> Tensor:
    """Pictures and latents in the memory format of the networks: 17 % off a compiled Stage B step on an H200."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def shapes(batch: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items()}


def make_accelerator(options: Options, folder: Path, *, compiled: bool) -> Accelerator:
    """accelerate, set up for one stage. Sharded networks have their own precision, and compile their blocks."""
    compiled = compiled and not options.sharded
    if compiled:
        # Otherwise the network is compiled in parts, so that gradients of one part are averaged while the next is computed. The
        # miniature's gradients are less than the 25 MB of a part.
        torch._dynamo.config.optimize_ddp = False
    return Accelerator(
        mixed_precision=options.precision if torch.cuda.is_available() and not options.sharded else "no",
        gradient_accumulation_steps=options.accumulate,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        # CUDA graphs ("reduce-overhead"), because launches bound the miniature's steps: Stage B, batch 256, has 33 ms of
        # kernels in a step of 74 ms. Constant sizes, because inductor fails on these networks with dynamic ones (torch 2.13).
        dynamo_plugin=TorchDynamoPlugin(
            backend="inductor" if compiled else "no", mode="reduce-overhead", dynamic=False
        ),
    )


@contextlib.contextmanager
def same_random_state(device: torch.device) -> Iterator[None]:
    """Restores the random state after the block, so that what the block draws does not change training."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class Trainer:
    """One call of `fit`."""

    def __init__(self, task: Task, options: Options, folder: Path, model: Path, began: float) -> None:
        self.task, self.options, self.folder, self.model = task, options, folder, model
        compiled = compiles(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not compiled and options.compile:
            logger.info("%s: not compiled, because there is no GPU.", folder.name)
        self.accelerator = make_accelerator(options, folder, compiled=compiled)
        self.batch_size = options.batch_of_one(self.accelerator.num_processes)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        set_seed(options.seed)
        if options.sharded:
            task.to(self.device)
            lower = options.precision == "bf16" and self.device.type == "cuda"
            shard(task, torch.bfloat16 if lower else None, compiled=compiled)
        else:
            task.to(self.device, memory_format=torch.channels_last)
        self.trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=options.learning_rate,
            betas=(0.9, options.beta2),
            weight_decay=options.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.ema = EMAModel(local(self.trained), decay=options.ema, use_ema_warmup=True, power=0.75, foreach=True)
        self.progress = Progress()
        self.network = self._prepare()
        self.compiled_shapes = shapes(self._batch(0)) if compiled and not options.sharded else None
        self.record, self.clock = self._begin_record(began)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _prepare(self) -> nn.Module:
        """Hands everything to accelerate and loads the checkpoint, if there is one. Returns the network as it is called."""
        if self.options.sharded:
            network, optimizer = self.task, self.optimizer
            self.optimizer = self.accelerator.prepare(optimizer)
            self.checkpoint = ShardedCheckpoint(
                self.accelerator, self.folder, self.task, optimizer, self.ema, self.progress
            )
        else:
            accept_earlier_checkpoints(self.task, self.optimizer, self.ema)
            network, self.optimizer = self.accelerator.prepare(self.task, self.optimizer)
            self.accelerator.register_for_checkpointing(self.ema, self.progress)
            self.checkpoint = Checkpoint(self.accelerator, self.folder)
        with writing(self.folder):
            self.accelerator.init_trackers(self.folder.name)
        if self.checkpoint.load():
            self.ema.to(self.device)
            # accelerate counts micro-batches. A checkpoint lies between steps, also if its steps had another number of them.
            self.accelerator.step = 0
            logger.info("%s: resumed at step %d", self.folder.name, self.progress.step)
        return network

    def _begin_record(self, began: float) -> tuple[Record, Clock]:
        record = Record.load(self.folder) or Record(self.folder.name, {})
        record.options = asdict(self.options)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        step = self.progress.step
        session = Session(timestamp(began), device, self.accelerator.num_processes, step, step)
        record.sessions.append(session)
        return record, Clock(session, began)

    def run(self, deadline: float) -> bool:
        """Trains until the last step, or until the deadline; see `fit`."""
        self.network.train()
        self.clock.lap("prepare")
        with Interruption() as interruption, contextlib.closing(self._bar()) as bar:
            saved, first = time.time(), self.progress.step
            while self.progress.step < self.options.steps:
                if self._agrees_at(first):
                    interrupted, late, due = self._agree(
                        interruption.signal is not None,
                        time.time() >= deadline,
                        time.time() - saved > self.options.checkpoint_seconds,
                    )
                    if interrupted:
                        self.save()
                        raise Stopped(interruption.signal or signal.SIGTERM, self.progress.step)
                    if late:
                        break
                    if due and self.progress.step > first:
                        self.save()
                        saved = time.time()
                outputs = self.step()
                if self.progress.step == first + 1:
                    self.clock.lap("compile")
                bar.update()
                self._log(outputs, bar)
                step = self.progress.step
                if step % self.options.evaluate_every == 0 and step < self.options.steps:
                    # The checkpoint comes first: after a kill in between, the next start must not take the components just
                    # written for those of an earlier training.
                    self.save()
                    saved = time.time()
                    self.review()
        self.save()
        self.review()
        self.accelerator.end_training()
        return self.progress.step >= self.options.steps

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.options.steps,
            initial=self.progress.step,
            desc=self.folder.name,
            mininterval=10,
            disable=not self.accelerator.is_main_process,
        )

    def _batch(self, index: int) -> dict[str, Tensor]:
        """Micro-batch ``index`` of this process."""
        generator = step_generator(self.options.seed, index, self.accelerator.process_index, self.device)
        batch = self.task.batch(index, self.batch_size, generator)
        return {name: to_channels_last(value) for name, value in batch.items()}

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs. Only batches of the usual shapes run compiled.

        Other picture sizes are rare, and compiling for one takes as long as thousands of steps (60 to 100 s on an H100).
        """
        if self.compiled_shapes is not None:  # it imports the compiler, for 2 s of a processor
            torch.compiler.cudagraph_mark_step_begin()
        # A task that has compiled parts of its own decides for itself. Forced here, they would run eagerly forward and compiled
        # when gradient checkpointing runs them again, in the backward pass.
        plain = self.compiled_shapes is not None and shapes(batch) != self.compiled_shapes
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager" if plain else "default"):
            return self.network(**batch)

    def step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the outputs of its last micro-batch."""
        step, options = self.progress.step, self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * learning_rate_factor(step, options)
        if options.sharded:
            share_buffers(self.task)
        for index in range(step * options.accumulate, (step + 1) * options.accumulate):
            batch = self._batch(index)
            # Averages gradients over processes, clips, and steps with the last micro-batch only.
            with self.accelerator.accumulate(self.network):
                last = self.accelerator.sync_gradients
                if options.sharded:
                    gather_once(self.task, last=last)
                outputs = self._forward(batch)
                self.accelerator.backward(outputs["loss"])
                if last and options.sharded:
                    clip(self.trained, options.clip)
                elif last:
                    self.accelerator.clip_grad_norm_(self.trained, options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            self.task.after_step(outputs, batch)
        self.ema.step(local(self.trained))
        self.progress.step += 1
        return outputs

    def _log(self, outputs: dict[str, Tensor], bar: tqdm) -> None:
        """Logs the scalars of every hundredth step, or of fifty steps in all if there are few."""
        step = self.progress.step
        if step % max(1, min(100, self.options.steps // 50)):
            return
        figures = {name: value.item() for name, value in outputs.items() if value.ndim == 0}
        bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
        rate = self.options.learning_rate * learning_rate_factor(step - 1, self.options)
        self.accelerator.log({**figures, "learning_rate": rate}, step=step)

    def _agrees_at(self, first: int) -> bool:
        """Whether processes agree at this step on whether to save or to stop; ``first`` is the first step of this call."""
        step, often = self.progress.step, self.options.sharded  # steps of large networks take seconds
        return self.accelerator.num_processes == 1 or often or step == first or step % AGREE_EVERY == 0

    def _agree(self, *wishes: bool) -> list[bool]:
        """Whether any process wants each of them. All must save and stop at the same step, or they would wait for each other
        forever.
        """
        if self.accelerator.num_processes == 1:
            return list(wishes)
        values = torch.tensor(wishes, dtype=torch.float32, device=self.device)
        return (self.accelerator.reduce(values) > 0).tolist()

    def save(self) -> None:
        """Saves a checkpoint and the record."""
        self.clock.lap("train")
        if any(self._agree(not all(parameter.isfinite().all() for parameter in local(self.trained)))):
            raise TrainingError(
                f"{self.folder.name}: the weights are infinite or NaN at step {self.progress.step}; the last checkpoint is "
                f"kept. The learning_rate, {self.options.learning_rate}, may be too large."
            )
        self.checkpoint.save()
        self.clock.lap("save")
        self._write_record()

    def _write_record(self) -> None:
        self.clock.session.last = self.progress.step
        if self.accelerator.is_main_process:
            self.record.save(self.folder)

    def review(self) -> None:
        """Evaluates the averaged weights, and writes the components with them."""
        self.ema.store(local(self.trained))
        self.ema.copy_to(local(self.trained))
        main, sharded = self.accelerator.is_main_process, self.options.sharded
        if main or sharded:
            figures, picture = self._evaluate()
        if main:
            self._report(figures)
            samples = self.folder / "samples"
            if picture is not None:
                with writing(samples):
                    samples.mkdir(parents=True, exist_ok=True)
                    picture.save(samples / f"{self.progress.step:06d}.png")
            with writing(self.model):
                write_components(self.model, self.folder.name, self.task.save)
        elif sharded:  # gives its rows to the main process
            self.task.save(self.model)
        self.task.train()
        self.ema.restore(local(self.trained))
        self.accelerator.wait_for_everyone()
        self.clock.lap("evaluate")
        self._write_record()

    def _evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """The task's evaluation, with the weights as they are."""
        with torch.no_grad(), self.accelerator.autocast(), same_random_state(self.device):
            batches = range(statistics_batches(self.task, self.options))
            refresh_statistics(self.task, map(self._batch, batches))
            self.task.eval()
            found = self.task.evaluate()
        if self.options.sharded:
            reshard(self.task)
        return found

    def _report(self, figures: dict[str, float]) -> None:
        """Logs the figures of an evaluation."""
        self.accelerator.log(figures, step=self.progress.step)
        unseen = self.task.unseen
        few = figures and unseen is not None and len(unseen) < FEW_PICTURES
        note = f" (on {len(unseen)} held-out pictures, too few to say much)" if few else ""
        logger.info("%s: step %d %s%s", self.folder.name, self.progress.step, figures, note)
