"""The training loop of every stage.

`fit` trains a `Task` through accelerate: mixed precision, gradient accumulation and clipping, several processes, averaged weights
(EMA), TensorBoard, evaluation, and checkpoints that resume exactly. This is possible because the data of a step depends only on
the seed, the step and the process.
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
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.running.errors import is_out_of_memory
from training.compile_log import wait_until_compiled
from training.divergence import Divergence
from training.errors import TrainingError, summary, writing
from training.gradient_check import STEPS, check_gradients
from training.interruption import Interruption, Stopped
from training.options import Options, compiles, learning_rate_factor
from training.randomness import same_random_state, step_generator
from training.record import Clock, Record, Session, timestamp
from training.statistics import refresh_statistics, statistics_batches
from training.task import Task
from training.torch_settings import set_up_torch
from training.weights.checkpoint import Progress
from training.weights.replicated import ReplicatedWeights
from training.weights.sharded import ShardedWeights

logger = logging.getLogger(__name__)

FEW_PICTURES = 16
"""Figures on fewer held-out pictures say little; the log line points that out."""


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
        TrainingError: the checkpoint does not fit, the weights are no longer finite, the training has diverged, a step needs more
            memory than there is or cannot be compiled, compiled gradients are wrong, or a file cannot be written.
    """
    return Trainer(task, options, folder, model, time.time() if began is None else began).run(deadline)


def to_channels_last(value: Tensor) -> Tensor:
    """Pictures and latents in the memory format of the networks: 17 % off a compiled Stage B step on an H200."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


class Trainer:
    """One call of `fit`."""

    def __init__(self, task: Task, options: Options, folder: Path, model: Path, began: float) -> None:
        self.task, self.options, self.folder, self.model = task, options, folder, model
        self.compiled = compiles(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not self.compiled and options.compile:
            logger.info("%s: not compiled, because there is no GPU.", folder.name)
        set_up_torch()
        self.progress = Progress()
        form = ShardedWeights if options.sharded else ReplicatedWeights
        self.weights = form(task, options, folder, self.progress, compiled=self.compiled)
        self.accelerator = self.weights.accelerator
        # Processes differ, or dropout would have the same masks in all.
        set_seed((options.seed + self.accelerator.process_index) % 2**32)
        self.batch_size = options.batch_of_one(self.accelerator.num_processes)
        with writing(folder):
            self.accelerator.init_trackers(folder.name)
        if self.weights.load():
            logger.info("%s: resumed at step %d", folder.name, self.progress.step)
        self.weights.expect(lambda: self.batch(0))
        self.first = self.progress.step
        self.record, self.clock = self._begin_record(began)
        self.saved = time.time()
        self.divergence = Divergence()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def _begin_record(self, began: float) -> tuple[Record, Clock]:
        record = Record.load(self.folder) or Record(self.folder.name, {})
        record.options = asdict(self.options)
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        session = Session(timestamp(began), device, self.accelerator.num_processes, self.first, self.first)
        record.sessions.append(session)
        return record, Clock(session, began)

    def run(self, deadline: float) -> bool:
        """Trains until the last step, or until the deadline; see `fit`."""
        self.weights.network.train()
        compiled_by = "compile" if self.compiled else self.task.compiled_by
        compares = compiled_by is not None and self.task.repeats()
        self.clock.lap("prepare")
        wait_until_compiled(self.folder)
        with Interruption() as interruption, contextlib.closing(self._bar()) as bar:
            while self.progress.step < self.options.steps and self._goes_on(interruption, deadline):
                with self._explaining():
                    outputs = self.step()
                if self.progress.step == self.first + 1:
                    self.clock.lap("compile")
                bar.update()
                self._log(outputs, bar)
                if compares and self.progress.step in STEPS:
                    check_gradients(self.weights, self.batch(0), self.folder.name, self.progress.step, compiled_by)
                if self.progress.step % self.options.evaluate_every == 0 and self.progress.step < self.options.steps:
                    # The checkpoint comes first: after a kill in between, the next start must not take the components just
                    # written for those of an earlier training.
                    self.save()
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

    def _goes_on(self, interruption: Interruption, deadline: float) -> bool:
        """Whether another step follows. Saves, if a checkpoint is due.

        Raises:
            Stopped: a signal came; a checkpoint has been saved.
        """
        step = self.progress.step
        if self.accelerator.num_processes > 1 and step != self.first and step % self.weights.agree_every:
            return True
        interrupted, late, due = self._agree(
            interruption.signal is not None,
            time.time() >= deadline,
            time.time() - self.saved > self.options.checkpoint_seconds,
        )
        if interrupted or (due and not late and step > self.first):
            self.save()
        if interrupted:
            raise Stopped(interruption.signal or signal.SIGTERM, step)
        return not late

    def _agree(self, *wishes: bool) -> list[bool]:
        """Whether any process wants each of them. All must save and stop at the same step, or they would wait for each other
        forever.
        """
        if self.accelerator.num_processes == 1:
            return list(wishes)
        values = torch.tensor(wishes, dtype=torch.float32, device=self.device)
        return (self.accelerator.reduce(values) > 0).tolist()

    def step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the outputs of its last micro-batch."""
        options, first = self.options, self.progress.step * self.options.accumulate
        self.weights.begin_step(options.learning_rate * learning_rate_factor(self.progress.step, options))
        for number in range(options.accumulate):
            batch = self.batch(first + number)
            with self.weights.micro_batch(number):
                outputs = self.weights.forward(batch)
                self.accelerator.backward(outputs["loss"])
            self.task.after_step(outputs, batch)
        self.weights.finish_step()
        self.progress.step += 1
        return outputs

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Says in a sentence why a step failed, if memory or torch's compiler may be the reason."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # what torch has compiled asserts shapes and strides
            if is_out_of_memory(error):
                raise TrainingError(
                    f"{self.folder.name}: the memory is too small for a micro-batch of {self.batch_size}; a smaller batch_size "
                    "needs less, and a larger accumulate makes up for it."
                ) from error
            if self.compiled and self.progress.step == self.first:
                raise TrainingError(
                    f"{self.folder.name}: the first step, compiled, failed ({summary(error)}); compile = false trains without "
                    "compiling."
                ) from error
            raise

    def batch(self, index: int) -> dict[str, Tensor]:
        """Micro-batch ``index`` of this process."""
        generator = step_generator(self.options.seed, index, self.accelerator.process_index, self.device)
        batch = self.task.batch(index, self.batch_size, generator)
        return {name: to_channels_last(value) for name, value in batch.items()}

    def _log(self, outputs: dict[str, Tensor], bar: tqdm) -> None:
        """Logs the scalars of every hundredth step, or of fifty steps in all if there are few.

        Raises:
            TrainingError: the training has diverged.
        """
        step = self.progress.step
        if step % max(1, min(100, self.options.steps // 50)):
            return
        figures = {name: value.item() for name, value in outputs.items() if value.ndim == 0}
        bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()}, refresh=False)
        rate = self.options.learning_rate * learning_rate_factor(step - 1, self.options)
        self.accelerator.log({**figures, "learning_rate": rate}, step=step)
        if any(self._agree(self.divergence.see(step, figures))):
            raise TrainingError(
                f"{self.folder.name}: at step {step}, the error is {self.divergence.mean:.2f} of that of predicting nothing: the "
                f"training has diverged. The last checkpoint is kept. The learning_rate, {self.options.learning_rate}, may be "
                "too large."
            )

    def save(self) -> None:
        """Saves a checkpoint and the record."""
        self.clock.lap("train")
        if any(self._agree(not self.weights.finite())):
            raise TrainingError(
                f"{self.folder.name}: the weights are infinite or NaN at step {self.progress.step}; the last checkpoint is "
                f"kept. The learning_rate, {self.options.learning_rate}, may be too large."
            )
        self.weights.checkpoint.save()
        self.saved = time.time()
        self.clock.lap("save")
        self._write_record()

    def _write_record(self) -> None:
        self.clock.session.last = self.progress.step
        if self.accelerator.is_main_process:
            self.record.save(self.folder)

    def review(self) -> None:
        """Evaluates the averaged weights, and writes the components with them."""
        with self.weights.averaged():
            if self.weights.evaluates:
                figures, picture = self._evaluate()
            if self.accelerator.is_main_process:
                self._report(figures, picture)
            self.weights.write(self.model, self.folder.name)
        self.task.train()
        self.accelerator.wait_for_everyone()
        self.clock.lap("evaluate")
        self._write_record()

    def _evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """The task's evaluation, with the weights as they are."""
        with self.weights.evaluating(), same_random_state(self.device):
            batches = range(statistics_batches(self.task, self.batch_size))
            refresh_statistics(self.task, map(self.batch, batches))
            self.task.eval()
            return self.task.evaluate()

    def _report(self, figures: dict[str, float], picture: Image.Image | None) -> None:
        """Logs an evaluation's figures, and keeps its sheet of pictures."""
        self.accelerator.log(figures, step=self.progress.step)
        unseen = self.task.unseen
        few = figures and unseen is not None and len(unseen) < FEW_PICTURES
        note = f" (on {len(unseen)} held-out pictures, too few to say much)" if few else ""
        said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) or "no figures"
        logger.info("%s: step %d: %s%s", self.folder.name, self.progress.step, said, note)
        samples = self.folder / "samples"
        if picture is not None:
            with writing(samples):
                samples.mkdir(parents=True, exist_ok=True)
                picture.save(samples / f"{self.progress.step:06d}.png")
