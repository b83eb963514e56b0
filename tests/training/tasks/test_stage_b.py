"""Stage B learns from semantic latents of several scales; every scale has one shape."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.networks.unet import resize
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.latents import at_scale
from training.randomness import step_generator
from training.shapes import Shapes
from training.tasks.stage_b import SCALES, StageBTask

CPU = torch.device("cpu")


class Waves(Dataset):
    """Waves, each of another brightness."""

    def __init__(self, count: int, tokenizer: Any) -> None:
        super().__init__(["waves"] * count, tokenizer, (256, 256), CPU)

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or self.size
        at = torch.linspace(0, 20, width) + torch.linspace(0, 10, height)[:, None]
        return (
            0.25
            + 0.25 * at.sin().expand(len(indices), 3, height, width)
            + 0.5 * (indices.float() / len(self)).view(-1, 1, 1, 1)
        )


def make_task(components: dict[str, Any], *, count: int = 40, **changes: Any) -> StageBTask:
    parts = copy.deepcopy({name: components[name] for name in ("decoder", "effnet", "vqgan", "text_encoder")})
    arguments = {
        "dataset": Waves(count, components["tokenizer"]),
        "unseen": Waves(4, components["tokenizer"]),
        "shapes": Shapes((256, 256), ((128, 192),), every=4),
        "weight": {"kind": "p2"},
        "pyramid": 0.0,
        "semantic_noise": 0.0,
        "drop_semantic": 0.0,
        "drop_text": 0.0,
        **changes,
    }
    return StageBTask(**parts, **arguments)


def batch(task: StageBTask, index: int) -> dict[str, Tensor]:
    return task.batch(index, 3, step_generator(0, index, 0, CPU))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 24])
def test_every_batch_has_the_latents_of_its_own_pictures_at_one_scale(components: dict[str, Any], count: int) -> None:
    task = make_task(components, count=count, other_scales=0.8)
    images, effnet = task.dataset.images(torch.arange(count)), task.frozen["effnet"]
    with torch.no_grad():
        latents = task.frozen["vqgan"].encode(images)
        small = {None: for_encoder(images), **{scale: at_scale(images, scale) for scale in SCALES}}
        maps = {scale: resize(effnet(pixels), (32, 32)) for scale, pixels in small.items()}
    seen = Counter()
    for index in range(40):
        if task.data.shapes.at(index) == task.dataset.size:
            made = batch(task, index)
            places = [(latents - one).abs().mean(dim=(1, 2, 3)).argmin().item() for one in made["latents"]]
            errors = {scale: (made["semantic"] - each[places]).abs().max().item() for scale, each in maps.items()}
            nearest = min(errors, key=errors.__getitem__)
            assert errors[nearest] < 5e-3  # of float16
            assert sorted(errors.values())[1] > 2e-2
            seen[nearest] += 1
    assert set(seen) == {None, *SCALES}
    assert 2 <= seen[None] <= 12  # a fifth of 30


@pytest.mark.slow
def test_without_other_scales_nothing_changes(components: dict[str, Any]) -> None:
    """The network is given what it would make of the latents itself."""
    task = make_task(components)
    made = batch(task, 0)
    (_, (_, semantic)) = task.data.draw(0, 3, step_generator(0, 0, 0, CPU))
    assert torch.equal(made["semantic"], resize(semantic, (32, 32)))
    one = task(**made)["loss"]
    assert torch.equal(task(**{**made, "semantic": semantic})["loss"], one)


def test_one_latent_stands_for_so_many_pixels() -> None:
    pixels = torch.rand(1, 3, 256, 384)
    sizes = {scale: tuple(side // 32 for side in at_scale(pixels, scale).shape[-2:]) for scale in SCALES}
    assert sizes == {32.0: (8, 12), 36.6: (7, 10), 51.2: (5, 8), 64.0: (4, 6)}
    assert at_scale(pixels[..., :64, :64], 64.0).shape[-2:] == (32, 32)


@pytest.mark.slow
def test_the_ends_of_the_range_are_evaluated(components: dict[str, Any]) -> None:
    with torch.no_grad():
        figures, _ = make_task(components, other_scales=0.5).eval().evaluate()
    assert set(figures) == {"psnr", "psnr_32", "psnr_64"}
