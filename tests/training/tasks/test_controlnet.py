"""ControlNets learn, and nothing else does; they start as the semantic encoder, and what is kept of pictures is enough."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cascade.guides import controls
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import IMAGENET_MEAN, IMAGENET_STD, SemanticEncoder
from training import statistics
from training.dataset import Dataset
from training.options import Options
from training.randomness import step_generator
from training.shapes import Shapes
from training.tasks.controlnet import Canny, ControlNetTask, Inpainting, new_controlnet
from training.trainer import fit
from training.workshop import load_component

OPTIONS = Options(steps=6, batch_size=8, learning_rate=1e-2, warmup=2, precision="no", compile=False, ema=0.9)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_batches_for_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """How well normalisations are measured does not matter here, and 40 batches take as long as all of the training."""
    monkeypatch.setattr(statistics, "BATCHES", 4)


class Squares(Dataset):
    """Black pictures with a white square each, of which the caption does not say where it is."""

    def __init__(self, count: int, tokenizer: Any) -> None:
        super().__init__(["a square"] * count, tokenizer, (128, 128), CPU)

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or self.size
        pixels = torch.zeros(len(indices), 3, height, width)
        for picture, index in zip(pixels, indices.tolist(), strict=True):
            top, left = (index * 37 % 5) * height // 8, (index * 53 % 7) * width // 12
            picture[:, top : top + height // 2, left : left + width // 2] = 1
        return pixels


def make_task(components: dict[str, Any], kind: Canny | Inpainting, **changes: Any) -> ControlNetTask:
    parts = copy.deepcopy(components)
    torch.manual_seed(0)
    arguments = {
        "control": kind,
        "name": "controlnet_test",
        "dataset": Squares(24, parts["tokenizer"]),
        "unseen": Squares(6, parts["tokenizer"]),
        "shapes": Shapes((128, 128), ((192, 128),), every=4),
        "weight": {"kind": "p2"},
        "drop_text": 0.1,
        "keep_image": 0.1,
        "offset_noise": 0.1,
        **{name: parts[name] for name in ("prior", "effnet", "previewer", "text_encoder", "image_encoder")},
        **changes,
    }
    controlnet = new_controlnet(parts["prior"], parts["effnet"], kind.channels, (0, 3))
    return ControlNetTask(controlnet, **arguments)


@pytest.fixture(scope="module")
def mini() -> dict[str, Any]:
    """The miniature's networks: a Stage C that knows nothing has no use for a control."""
    folder = Path(__file__).parents[3] / "weights" / "mini"
    names = ("tokenizer", "prior", "effnet", "previewer", "text_encoder", "image_encoder")
    return {name: load_component(folder, name) for name in names}


def test_the_first_convolution_sees_of_a_control_what_the_encoder_sees_of_a_picture(components: dict[str, Any]) -> None:
    """Up to one number a channel, the mean's share; that of another number of channels than three has no padding."""
    encoder: SemanticEncoder = components["effnet"]
    pixels = torch.rand(2, 3, 64, 64)
    gray = pixels[:, :1].expand(-1, 3, -1, -1)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    masks = torch.rand(2, 1, 64, 64)
    for control, picture in ((pixels[:, :1], gray), (torch.cat([pixels, masks], dim=1), pixels)):
        network = new_controlnet(components["prior"], encoder, control.shape[1], (0, 3))
        with torch.no_grad():
            expected = encoder.backbone[0][0]((picture - mean) / deviation)[:, :, 1:, 1:]
            # The padding makes windows begin at odd pixels.
            difference = network.backbone[0][0](control[:, :, 1:, 1:]) - expected
        assert difference.std(dim=(0, 2, 3)).max() < 1e-5 < expected.std(dim=(0, 2, 3)).min()
        for key, value in encoder.backbone.state_dict().items():
            if key != "0.0.weight":
                assert torch.equal(network.backbone.state_dict()[key], value)


def test_a_new_one_changes_nothing(components: dict[str, Any]) -> None:
    task = make_task(components, Canny())
    batch = task.batch(0, 4, step_generator(0, 0, 0, CPU))
    without = {name: value for name, value in batch.items() if name != "control"}
    blank = torch.zeros_like(batch["control"])
    assert batch["control"].any()
    assert torch.equal(task(**batch)["loss"], task(**without, control=blank)["loss"])


def test_edges_are_kept_as_the_engine_finds_them() -> None:
    pixels = torch.rand(20, 3, 6, 6).repeat_interleave(32, dim=2).repeat_interleave(32, dim=3)
    control = Canny().make(Canny().keep(pixels), torch.Generator())
    expected = controls.canny(pixels)
    assert expected.mean() > 0.01
    torch.testing.assert_close(control, expected, rtol=0, atol=0.5 / 255 + 1e-6)


def test_pictures_are_masked_anew_at_every_step() -> None:
    pixels = torch.rand(3, 3, 64, 96)
    kind = Inpainting(inverted=0.5)
    kept = kind.keep(pixels)
    one, two = (kind.make(kept, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.shape == (3, 4, 64, 96)
    mask = one[:, 3:] > 0
    assert 0 < mask.float().mean() < 1
    assert (one[:, :3][mask.expand(-1, 3, -1, -1)] == 1).all()
    torch.testing.assert_close(one[:, :3].where(~mask, 0), pixels.where(~mask, 0), rtol=0, atol=0.5 / 255 + 1e-6)
    assert not torch.equal(mask, two[:, 3:] > 0)


def test_offset_noise_shifts_whole_channels(components: dict[str, Any]) -> None:
    """The deviation of the mean of n white numbers is 1 / sqrt(n), that of the offset is what was asked for."""
    size = 400
    means = {}
    for offset in (0.0, 0.5):
        task = make_task(components, Canny(), offset_noise=offset)
        means[offset] = task.batch(0, size, step_generator(0, 0, 0, CPU))["noise"].mean(dim=(2, 3))
    assert means[0.0].std().item() == pytest.approx(1 / 3, rel=0.05)
    assert means[0.5].std().item() == pytest.approx((1 / 9 + 1 / 4) ** 0.5, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Canny(), Inpainting(inverted=0.2)])
def test_only_the_controlnet_learns_and_it_learns_from_its_control(
    mini: dict[str, Any], tmp_path: Path, kind: Canny | Inpainting
) -> None:
    """After training, the loss is less than before, and less than with the controls of other pictures."""
    task = make_task(mini, kind, unseen=Squares(1, mini["tokenizer"]), shapes=Shapes((96, 96)))
    batch = task.batch(10_000, 16, step_generator(0, 10_000, 0, CPU))
    with torch.no_grad():
        start = task(**batch)["loss"].item()
    assert fit(task, replace(OPTIONS, steps=16, batch_size=4, learning_rate=3e-3), tmp_path / "run", tmp_path / "model")
    with torch.no_grad():
        right = task(**batch)["loss"].item()
        wrong = task(**{**batch, "control": batch["control"].roll(1, dims=0)})["loss"].item()
    assert right < 0.5 * start
    assert right < 0.95 * wrong
    for name in ("prior", "effnet", "previewer"):
        assert not task.frozen[name].training
        for key, value in mini[name].state_dict().items():
            assert torch.equal(task.frozen[name].state_dict()[key], value), key
    saved = ControlNet.from_pretrained(tmp_path / "model" / "controlnet_test").eval()
    assert all(residual.abs().mean() > 0 for residual in saved(batch["control"]).values())
    assert (tmp_path / "run" / "samples" / "000016.png").is_file()


@pytest.mark.slow
def test_stopping_changes_nothing(components: dict[str, Any], tmp_path: Path) -> None:
    whole, stopped, resumed = (make_task(components, Inpainting(inverted=0.2)) for _ in range(3))
    fit(whole, OPTIONS, tmp_path / "whole", tmp_path / "model")
    stopped.after_step = interrupt_at(4)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, replace(OPTIONS, checkpoint_seconds=0.0), tmp_path / "halves", tmp_path / "model_halves")
    assert fit(resumed, OPTIONS, tmp_path / "halves", tmp_path / "model_halves")
    file = Path("controlnet_test") / "diffusion_pytorch_model.safetensors"
    expected, made = (load_file(tmp_path / name / file) for name in ("model", "model_halves"))
    for key, value in expected.items():
        torch.testing.assert_close(made[key], value, rtol=0, atol=0)


def interrupt_at(step: int) -> Any:
    """A method that raises when it is called for the `step`-th time."""
    remaining = iter(range(step - 1))

    def after_step(*_: object) -> None:
        if next(remaining, None) is None:
            raise KeyboardInterrupt

    return after_step
