"""Adapters in weights of 8 bits: the sum of matrix and adapters is rounded to 8 bits, and the base restored to the bit."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cascade import Cascade, Lora, kernels
from cascade.running.placement import MemoryMode
from scripts.save_weights import main
from tests.components import components_in_eight_bits, equal, restored_from
from tests.loras.files import lora
from tests.loras.test_loras import REQUEST, request, same, trained
from tests.running.test_memory import make_cached, pack
from tests.tiny import make_cascade

ADAPTED = ("prior", "decoder", "text_encoder")


@pytest.fixture(scope="module", params=["int8", "fp8"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def eight(components: dict[str, Any], precision: str) -> dict[str, Any]:
    return components_in_eight_bits(components, precision)


@pytest.fixture(autouse=True)
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device can multiply in e4m3: the plain functions do."""
    monkeypatch.setattr(kernels, "lacks_e4m3", lambda *_: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "a": lora(components, folder / "a.safetensors", 1, size=1.0),
        "b": lora(components, folder / "b.safetensors", 2, "decoder", size=1.0),
    }


@pytest.fixture(scope="module")
def stored(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model folders by the precision in which they are stored. Not to be changed."""

    @functools.cache
    def folder_of(precision: str) -> Path:
        if precision == "full":
            return model_folder
        folder = tmp_path_factory.mktemp("stored") / "model"
        assert main(["--precision", precision, "--base", str(model_folder), "--output", str(folder)]) == 0
        return folder

    return folder_of


def matrices(components: dict[str, Any], eight: dict[str, Any]) -> dict[str, Any]:
    """Ordinary networks, with the matrices that weights in 8 bits stand for."""
    return components | {name: restored_from(eight[name], components[name]) for name in ADAPTED}


def make(eight: dict[str, Any], mode: str) -> Cascade:
    if mode == "resident":
        return make_cascade(eight)
    size = pack(eight)["prior"].size // 2 if mode == "stream" else None
    return make_cached(eight, MemoryMode(mode, size))


@pytest.fixture(scope="module")
def fresh(components: dict[str, Any], eight: dict[str, Any], precision: str) -> Callable[..., list[Image.Image]]:
    """The pictures of sums that were rounded from the beginning; made once for all memory modes."""
    base = matrices(components, eight)

    @functools.cache
    def pictures_of(*loras: Lora) -> list[Image.Image]:
        with_them = trained(base, *((one.path, one.scale) for one in loras))
        return make_cascade(components_in_eight_bits(with_them, precision) if loras else eight).generate(REQUEST)

    return pictures_of


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_pictures_are_those_of_rounded_sums(
    mode: str, eight: dict[str, Any], files: dict[str, Path], fresh: Callable[..., list[Image.Image]]
) -> None:
    cascade = make(eight, mode)
    for loras in [(), (Lora(files["a"]),), (Lora(files["b"], 0.5), Lora(files["a"], -1)), ()]:
        made = cascade.generate(request(*loras))
        assert same(made, fresh(*loras)), loras
        assert same(made, fresh()) == (not loras)


@pytest.mark.parametrize("kept", ["full", "int8", "fp8"])
def test_the_base_is_restored_from_its_files(
    kept: str, stored: Callable[[str], Path], files: dict[str, Path], precision: str
) -> None:
    cascade = Cascade.load(stored(kept), "cpu", "bfloat16", precision=precision)
    networks = {"prior": cascade.prior, "decoder": cascade.decoder, "text_encoder": cascade.text.encoder}
    before = {
        name: {key: tensor.clone() for key, tensor in network.state_dict().items()}
        for name, network in networks.items()
    }
    base = cascade.generate(REQUEST)
    assert not same(cascade.generate(request(Lora(files["a"]), Lora(files["b"]))), base)
    assert all(
        any(not equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())
        for name, network in networks.items()
    )
    assert same(cascade.generate(REQUEST), base)
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            assert equal(tensor, before[name][key]), key


def test_a_base_in_8_bits_may_be_loaded_in_full(
    stored: Callable[[str], Path],
    files: dict[str, Path],
    components: dict[str, Any],
    eight: dict[str, Any],
    precision: str,
) -> None:
    """Its files are read again: the matrices that they stand for are restored, and get the adapters."""
    cascade = Cascade.load(stored(precision), "cpu", "float32", precision="full")
    base = cascade.generate(REQUEST)
    expected = make_cascade(trained(matrices(components, eight), (files["a"], 1.0)))
    cascade.generate(request(Lora(files["a"])))
    for key, tensor in expected.prior.state_dict().items():
        assert torch.equal(cascade.prior.state_dict()[key], tensor), key
    assert same(cascade.generate(REQUEST), base)
