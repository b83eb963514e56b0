"""Model folders in the precision fp8: the same numbers as weights that are rounded when they load, and what is loaded where."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cascade import Cascade, Control, Request, kernels
from cascade.kernels.e4m3 import E4M3
from cascade.networks.eight_bits import NETWORKS
from cascade.networks.precisions import network_precision, wanted_forms
from cascade.weights import ModelFolder, WeightsError
from scripts.save_weights import main
from tests.components import components_in_eight_bits, equal, restored_from
from tests.conftest import MINI
from tests.tiny import make_cascade

SMALL = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 1}
PRIOR = "prior/diffusion_pytorch_model.safetensors"


def store(base: Path, folder: Path, precision: str = "fp8") -> Path:
    assert main(["--precision", precision, "--base", str(base), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stored(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, stored in fp8 by the command."""
    return store(model_folder, tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device can multiply in e4m3: the plain functions do."""
    monkeypatch.setattr(kernels, "lacks_e4m3", lambda *_: None)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_and_rounded_weights_are_the_same(model_folder: Path, stored: Path, dtype: torch.dtype) -> None:
    for name in NETWORKS:
        rounded = ModelFolder.open(model_folder).load_component(name, dtype=dtype, precision="fp8")
        read = ModelFolder.open(stored).load_component(name, dtype=dtype, precision="fp8")
        assert network_precision(rounded) == ("fp8" if name in ("prior", "decoder") else "int8")
        assert same_weights(rounded, read)
        ordinary = ModelFolder.open(stored).load_component(name, dtype=dtype)
        assert network_precision(ordinary) == "full"
        assert same_weights(ordinary, restored_from(read, ordinary))


def test_what_is_stored(stored: Path, model_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(stored / PRIOR)
    forms = wanted_forms({key: tensor.shape for key, tensor in tensors.items()}, "prior", "fp8")
    assert set(forms.values()) == {torch.int8, E4M3}
    for key, tensor in tensors.items():
        if not key.endswith("scale"):
            assert tensor.dtype == forms.get(key, torch.float32), key
        else:
            assert tensor.dtype == (
                torch.float32 if tensors[key.removesuffix("_scale")].dtype == E4M3 else torch.bfloat16
            )
    ModelFolder.open(stored).verify()
    # Stored again, nothing changes.
    assert (store(stored, tmp_path / "again") / PRIOR).read_bytes() == (stored / PRIOR).read_bytes()


def test_rows_must_have_one_scale(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored, tmp_path / "changed")
    tensors = load_file(folder / PRIOR)
    key = next(key for key, tensor in tensors.items() if tensor.dtype == E4M3)
    tensors[f"{key}_scale"][-1] *= 2
    save_file(tensors, folder / PRIOR)
    for precision in ("full", "fp8"):
        with pytest.raises(
            WeightsError, match=rf"prior.*: {key}_scale differs from row to row; all rows must have one"
        ):
            ModelFolder.open(folder, check=False).load_component("prior", precision=precision)


def test_one_stored_precision_becomes_another(model_folder: Path, stored: Path, tmp_path: Path) -> None:
    small = store(stored, tmp_path / "int8", "int8")
    assert ModelFolder.open(small).precision() == "int8"
    assert ModelFolder.open(store(small, tmp_path / "fp8")).precision() == "fp8"
    for name in ("prior", "decoder"):
        one, other = (ModelFolder.open(folder).load_component(name) for folder in (model_folder, tmp_path / "fp8"))
        for key, tensor in one.state_dict().items():
            assert (other.state_dict()[key] - tensor).norm() < 0.06 * tensor.norm(), key


def test_the_miniature_takes_less_disk(tmp_path: Path) -> None:
    folder = store(MINI, tmp_path / "mini")
    sizes = [sum(file.stat().st_size for file in (one / "prior").iterdir()) for one in (MINI, folder)]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.usefixtures("multiplies")
@pytest.mark.parametrize(
    ("precision", "of_original", "of_stored"),
    [("auto", "full", "fp8"), ("full", "full", "full"), ("int8", "int8", "int8"), ("fp8", "fp8", "fp8")],
)
def test_what_is_loaded(model_folder: Path, stored: Path, precision: str, of_original: str, of_stored: str) -> None:
    for folder, wanted in ((model_folder, of_original), (stored, of_stored)):
        cascade = Cascade.load(folder, "cpu", precision=precision)
        assert cascade.precision == network_precision(cascade.decoder) == wanted
        assert network_precision(cascade.text.encoder) == {"fp8": "int8"}.get(wanted, wanted)


@pytest.mark.parametrize("precision", ["fp8", "auto"])
def test_a_machine_without_such_products(stored: Path, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert Cascade.load(stored, "cpu", precision=precision).precision == "full"
    said = "Precision: full instead of fp8, because products in 8 bits need a CUDA GPU, and the device is cpu."
    assert said in caplog.messages


@pytest.mark.usefixtures("multiplies")
def test_pictures_do_not_depend_on_what_is_stored(model_folder: Path, stored: Path) -> None:
    request = Request("a b", seed=1, **SMALL)
    made = [
        np.asarray(Cascade.load(folder, "cpu", precision=precision).generate(request)[0], np.int16)
        for folder, precision in ((model_folder, "fp8"), (stored, "auto"), (model_folder, "full"))
    ]
    assert np.array_equal(made[0], made[1])
    assert 0 < np.abs(made[0] - made[2]).mean() < 30


def test_every_guide_works(components: dict[str, Any]) -> None:
    """With ControlNets, whose residuals are added to the stream, and an IP-Adapter, which adds to the attention."""
    image = Image.effect_noise((64, 64), 64).convert("RGB")
    request = Request("a b", controls=(Control("canny", image),), ip_adapter_images=(image,), image=image, **SMALL)
    made = [
        np.asarray(make_cascade(one).generate(request)[0], np.int16)
        for one in (components, components_in_eight_bits(components, "fp8"))
    ]
    assert 0 < np.abs(made[0] - made[1]).mean() < 30


@pytest.mark.slow
@pytest.mark.usefixtures("multiplies")
def test_pictures_of_the_miniature() -> None:
    """Within 2 of 255, in the mean of some."""
    prompts, steps = ("a red apple on a yellow background", "two dogs"), {"steps_prior": 8, "steps_decoder": 4}
    made = {}
    for precision in ("full", "fp8"):
        cascade = Cascade.load(MINI, "cpu", "float32", precision=precision)
        pictures = cascade.batch([Request(prompt, seed=seed, **steps) for seed, prompt in enumerate(prompts)])
        made[precision] = np.stack([np.asarray(one, np.float32) for (one,) in pictures])
    assert 0 < np.abs(made["full"] - made["fp8"]).mean() < 2
