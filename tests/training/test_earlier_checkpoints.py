"""A training that an earlier version began goes on, as if it had been this one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet as PublishedLayers
from PIL import Image
from torch import Tensor, nn

from cascade.networks.unet import StableCascadeUNet
from training.options import Options
from training.task import Task
from training.trainer import fit

OPTIONS = Options(
    steps=5, batch_size=2, learning_rate=1e-3, warmup=1, precision="no", compile=False, evaluate_every=100, ema=0.9
)
SMALL = {
    "conditioning_dim": 16,
    "block_out_channels": (16, 16),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "clip_text_in_channels": 20,
    "clip_text_pooled_in_channels": 24,
    "clip_image_in_channels": 12,
    "switch_level": (False,),
    "dropout": (0.0, 0.0),
}


class Denoise(Task):
    """With a layer before and after the UNet, and one that is not trained."""

    def __init__(self, network: type[nn.Module], stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.prior = network(**SMALL)
        self.after = nn.Linear(3, 3)
        weights = StableCascadeUNet(**SMALL).state_dict()
        generator = torch.Generator().manual_seed(1)
        self.prior.load_state_dict({k: 0.2 * torch.randn(x.shape, generator=generator) for k, x in weights.items()})
        for layer in (self.before, self.frozen, self.after):
            nn.init.eye_(layer.weight)
        self.stop_at = stop_at

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        if index == self.stop_at:
            raise KeyboardInterrupt
        shapes = {"x": (16, 4, 4), "t": (), "clip_text_pooled": (1, 24), "clip_text": (7, 20), "clip_img": (1, 12)}
        return {name: torch.rand(size, *shape, generator=generator) for name, shape in shapes.items()}

    def forward(self, x: Tensor, t: Tensor, **given: Tensor) -> dict[str, Tensor]:
        out = self.prior(x, t, **given)
        ends = self.after(self.frozen(self.before(x[:, :3].transpose(1, 3))))
        return {"loss": (getattr(out, "sample", out) - x).square().mean() + ends.square().mean()}

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        return {}, Image.new("RGB", (4, 4))

    def save(self, folder: Path) -> None:
        self.prior.save_pretrained(folder / "prior")


@pytest.mark.slow
def test_a_training_that_an_earlier_version_began(tmp_path: Path) -> None:
    whole = Denoise(PublishedLayers)
    fit(whole, OPTIONS, tmp_path / "whole", tmp_path / "whole_model")
    with pytest.raises(KeyboardInterrupt):
        fit(Denoise(PublishedLayers, 3), replace(OPTIONS, checkpoint_seconds=0.0), tmp_path / "run", tmp_path / "model")
    halves = Denoise(StableCascadeUNet)
    fit(halves, OPTIONS, tmp_path / "run", tmp_path / "model")
    start = Denoise(StableCascadeUNet).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], tensor, atol=2e-5, rtol=1e-4)
    assert sum(not torch.equal(tensor, start[name]) for name, tensor in whole.state_dict().items()) > 100
    # The averaged weights, which are what is saved.
    first, second = (StableCascadeUNet.from_pretrained(tmp_path / name / "prior") for name in ("whole_model", "model"))
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, atol=2e-5, rtol=1e-4)
        assert not torch.equal(tensor, whole.state_dict()[f"prior.{name}"])


@pytest.mark.slow
def test_a_training_of_this_version(tmp_path: Path) -> None:
    whole = Denoise(StableCascadeUNet)
    fit(whole, OPTIONS, tmp_path / "whole", tmp_path / "whole_model")
    with pytest.raises(KeyboardInterrupt):
        fit(
            Denoise(StableCascadeUNet, 3),
            replace(OPTIONS, checkpoint_seconds=0.0),
            tmp_path / "run",
            tmp_path / "model",
        )
    halves = Denoise(StableCascadeUNet)
    fit(halves, OPTIONS, tmp_path / "run", tmp_path / "model")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(halves.state_dict()[name], tensor)
