"""What training a LoRA of the published Stage C takes: memory at batch 1, and samples a second at batch 8. Random weights."""

import logging
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.weights import StageSettings
from tests.gpu.full_size import published_config
from training.lora.adapters import add_lora, linear_layers
from training.lora.data import Latents, Texts
from training.options import Options
from training.randomness import step_generator
from training.record import Record
from training.tasks.lora import LoraTask
from training.trainer import fit

GIB = 2**30
PICTURES = 16
STEPS = 24
SAMPLER = StageSettings(steps=2, guidance=1.0, shift=2.0, rescale=0.7)


def make_task(*, rank: int, checkpointing: bool, compiled: bool) -> LoraTask:
    """Of 16 pictures of 1024x1024 pixels, whose latents and captions are noise."""
    device = torch.device("cuda")
    config = published_config("prior")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            prior = StableCascadeUNet(**config)
    finally:
        torch.set_default_dtype(default)
    # As initialised, it predicts zero whatever it is given, and no gradient reaches a LoRA.
    torch.nn.init.normal_(prior.clf[1].weight, std=0.02)
    prior.use_kernels("plain")
    trained = add_lora(prior, linear_layers(prior, ["attention"]), rank=rank, alpha=rank)
    if checkpointing:
        prior.enable_gradient_checkpointing()
    if compiled:
        for block in prior.blocks():
            block.compile()
    tokens = torch.randn(PICTURES + 1, 77, config["clip_text_in_channels"], device=device, dtype=torch.bfloat16)
    pooled = torch.randn(PICTURES + 1, 1, config["clip_text_pooled_in_channels"], device=device, dtype=torch.bfloat16)
    texts = Texts(PICTURES + 1, lambda rows: TextEmbeddings(tokens[rows], pooled[rows]), device, changing=False)
    latents = Latents([(torch.randn(PICTURES, 16, 24, 24, device=device), torch.arange(PICTURES, device=device))])
    return LoraTask(
        prior,
        trained,
        text=texts,
        latents=latents,
        resolution=1024,
        settings=SAMPLER,
        write=lambda folder: None,
        compiled=compiled,
    )


def measured(folder: Path, batch: int, *, checkpointing: bool = True, compiled: bool = False) -> tuple[float, float]:
    """Samples a second after the first steps, and the largest memory that torch reserved, in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    task = make_task(rank=16, checkpointing=checkpointing, compiled=compiled)
    rates = []
    for steps in (4, 4 + STEPS):  # the second call is warm
        options = Options(steps=steps, batch_size=batch, learning_rate=1e-4, warmup=0, compile=False)
        fit(task, options, folder / "lora", folder / "model")
        session = Record.load(folder / "lora").sessions[-1]
        rates.append((session.last - session.first - 1) * batch / session.seconds["train"])
    peak = torch.cuda.max_memory_reserved() / GIB
    print(  # what is measured is asked for
        f"\n{torch.cuda.get_device_name()}: batch {batch}, checkpointing {checkpointing}, compiled {compiled}: "
        f"{rates[-1]:.2f} samples/s, {peak:.2f} GiB reserved, {torch.cuda.max_memory_allocated() / GIB:.2f} GiB allocated"
    )
    return rates[-1], peak


def test_memory_of_batch_1(tmp_path: Path) -> None:
    _, peak = measured(tmp_path, 1)
    assert peak <= 12


@pytest.mark.parametrize("compiled", [False, True])
def test_samples_of_batch_8(compiled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rate, _ = measured(tmp_path, 8, compiled=compiled)
    print(f"floor: {floor():.1f} TFLOP a sample: {floor() * rate:.0f} TFLOP/s")
    if compiled:
        assert rate >= 12


def test_without_checkpointing(tmp_path: Path) -> None:
    measured(tmp_path, 8, checkpointing=False)


def floor() -> float:
    """Matrix products of one sample's step, recomputation included, in 10^12 operations."""
    task = make_task(rank=16, checkpointing=True, compiled=False)
    batch = task.batch(0, 1, step_generator(0, 0, 0, torch.device("cuda")))
    with FlopCounterMode(display=False) as counter, torch.autocast("cuda", torch.bfloat16):
        task(**batch)["loss"].backward()
    return counter.get_total_flops() / 1e12


def test_bfloat16_weights_are_trained_in_float32(tmp_path: Path) -> None:
    task = make_task(rank=4, checkpointing=True, compiled=False)
    before = {name: value.clone() for name, value in task.trained.items()}
    fit(task, Options(steps=3, batch_size=2, learning_rate=1e-3, compile=False), tmp_path / "lora", tmp_path / "model")
    assert all(value.dtype == torch.float32 for value in task.trained.values())
    changed = [name for name, value in task.trained.items() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)
    assert next(iter(task.networks["prior"].state_dict().values())).dtype == torch.bfloat16
