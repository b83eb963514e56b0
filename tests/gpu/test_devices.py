"""A GPU makes the pictures that the CPU makes, in any batch."""

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.guides.controls import Control
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.sampling import SAMPLERS

SMALL = {"width": 64, "height": 64, "steps_prior": 3, "steps_decoder": 2}

pytestmark = pytest.mark.usefixtures("exact_float32")


@pytest.fixture(scope="module")
def on_cpu(model_folder: Path) -> Cascade:
    return Cascade.load(model_folder, "cpu", torch.float32)


@pytest.fixture(scope="module")
def on_gpu(model_folder: Path) -> Cascade:
    return Cascade.load(model_folder, "cuda", torch.float32)


def difference(first: Image.Image, second: Image.Image) -> int:
    """The largest, of 255. Both pictures show something."""
    one, other = (np.asarray(image).astype(int) for image in (first, second))
    assert one.shape == other.shape
    assert min(one.std(), other.std()) > 5
    return np.abs(one - other).max()


@pytest.mark.parametrize(
    "sampling",
    [{"sampler": sampler} for sampler in SAMPLERS] + [{"speed": "fast"}, {"guidance_interval": (0.3, 0.6)}],
    ids=lambda sampling: str(*sampling.values()),
)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (100, 75)])
def test_a_seed_makes_the_same_picture_on_cpu_and_gpu(
    on_cpu: Cascade, on_gpu: Cascade, sampling: dict[str, Any], width: int, height: int
) -> None:
    request = Request("a cat", "fog", seed=7, num_images=2, **sampling, **{**SMALL, "width": width, "height": height})
    for first, second in zip(on_cpu.generate(request), on_gpu.generate(request), strict=True):
        assert difference(first, second) <= 1


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_picture_i_of_a_seed_is_picture_0_of_the_seed_i_higher(on_cpu: Cascade, model_folder: Path, batch: int) -> None:
    cascade = Cascade.load(model_folder, "cuda", torch.float32, max_batch=batch)
    together = cascade.generate(Request("a cat", seed=3, num_images=5, **SMALL))
    assert len({image.tobytes() for image in together}) == 5
    for i, image in enumerate(together):
        request = Request("a cat", seed=3 + i, **SMALL)
        for other in (cascade, on_cpu):
            (alone,) = other.generate(request)
            assert difference(image, alone) <= 1


def test_pictures_are_read_alike(on_cpu: Cascade, on_gpu: Cascade) -> None:
    (image,) = on_cpu.generate(Request("a cat", **SMALL))
    torch.testing.assert_close(on_gpu.encode(image).cpu(), on_cpu.encode(image), rtol=1e-3, atol=1e-3)
    first, second = (cascade.reconstruct(image, seed=5) for cascade in (on_cpu, on_gpu))
    assert difference(first, second) <= 1


def test_a_gpu_is_used_where_there_is_one_and_in_bfloat16(model_folder: Path) -> None:
    cascade = Cascade.load(model_folder)
    networks = (cascade.prior, cascade.decoder, cascade.vqgan, cascade.effnet, cascade.previewer)
    encoders = (cascade.text.encoder, cascade.image_prompts.encoder)
    for network in (*networks, *encoders):
        assert {(one.device.type, one.dtype) for one in network.parameters()} == {("cuda", torch.bfloat16)}
    for progress in cascade.steps(Request("a cat", num_images=2, **SMALL)):
        if progress.latents is not None:
            assert progress.latents.device.type == "cuda"
            assert progress.latents.dtype == torch.float32
            assert progress.latents.isfinite().all()
    assert progress.image.size == (64, 64)


def everything(cascade: Cascade, size: int = 128) -> list[Image.Image]:
    """Pictures of which every network makes something."""
    small = {"width": size, "height": size, "steps_prior": 3, "steps_decoder": 2}
    (image,) = cascade.generate(Request("a red apple", seed=1, **small))
    controls = tuple(Control(kind, image) for kind in cascade.controlnets)
    mask = Image.new("L", (size, size), "white")
    given = {"image": image, "image_prompts": (image,), "mask": mask, "controls": controls}
    images = [image, *cascade.generate(Request("a blue cup", num_images=2, **given, **small))]
    for progress in cascade.steps(Request("a cat", **small)):
        if progress.stage == "prior":
            images += cascade.preview(progress.latents)
    return [*images, cascade.reconstruct(image)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_the_second_gpu_makes_the_pictures_of_the_first(
    mini_with_controlnets: Path, memory: str, dtype: torch.dtype
) -> None:
    """While the first is the current one, whose memory it leaves alone; and both in one process."""
    gc.collect()
    torch.cuda.empty_cache()  # as the engine does before it captures a graph, on all devices
    before = torch.cuda.memory_reserved(0)
    second = Cascade.load(mini_with_controlnets, "cuda:1", dtype, memory=memory)
    pictures = [everything(second) for _ in range(2)]
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_reserved(0) <= before
    first = Cascade.load(mini_with_controlnets, "cuda:0", dtype, memory=memory)
    pictures += [everything(first) for _ in range(2)]
    for one, other in [*zip(pictures[0], pictures[2], strict=True), *zip(pictures[1], pictures[3], strict=True)]:
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    third = everything(second, 192)  # captured after a capture on the first
    for one, other in zip(third, everything(first, 192), strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_current_device_is_the_callers_between_steps(model_folder: Path) -> None:
    steps = Cascade.load(model_folder, "cuda:1").steps(Request("a cat", **SMALL))
    for _ in steps:
        assert torch.cuda.current_device() == 0


def test_float16_makes_the_pictures_of_float32() -> None:
    folder = Path(__file__).parents[2] / "weights" / "mini"
    half, exact = (Cascade.load(folder, "cuda", dtype) for dtype in ("float16", "float32"))
    for seed in range(4):
        request = Request("a red apple on a green background", seed=seed)
        (one,), (other,) = half.generate(request), exact.generate(request)
        assert np.abs(np.asarray(one).astype(float) - np.asarray(other)).mean() <= 2


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_checkpointing_trades_memory_for_the_same_gradients(components: dict[str, Any], stage: str) -> None:
    network = copy.deepcopy(components[stage]).to("cuda").train()
    config, side = network.config, 64
    torch.manual_seed(0)
    given = {
        "sample": torch.randn(2, config.in_channels, side, side),
        "timestep_ratio": torch.rand(2),
        "clip_text_pooled": torch.randn(2, 1, config.clip_text_pooled_in_channels),
    }
    if stage == "prior":
        given["clip_text"] = torch.randn(2, 77, config.clip_text_in_channels)
        given["clip_img"] = torch.randn(2, 1, config.clip_image_in_channels)
    else:
        given["effnet"] = torch.randn(2, config.effnet_in_channels, 6, 6)
        given["pixels"] = torch.randn(2, 3, 8, 8)
    given = {name: x.to("cuda") for name, x in given.items()}

    def gradients() -> tuple[list[torch.Tensor], int]:
        """And the bytes of memory that they took."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(1)  # of the dropout
        found = torch.autograd.grad(network(**given).square().mean(), list(network.parameters()))
        return found, torch.cuda.max_memory_allocated() - before

    gradients()  # what libraries allocate once is not counted
    plain, memory = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    network.enable_gradient_checkpointing()
    checkpointed, less_memory = gradients()
    # Of all gradients: that of a key's bias, which changes no softmax, consists of rounding alone.
    largest = max(expected.abs().max().item() for expected in plain)
    for gradient, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6 * largest)
    assert less_memory < 0.8 * memory
