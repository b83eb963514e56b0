"""Model folders with weights in 8 bits: half of the bytes, and the same numbers as weights that are rounded when they load."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cascade import Cascade, Request
from cascade.networks.eight_bits import NETWORKS
from cascade.networks.precisions import network_precision, wanted_forms
from cascade.running.device import SettingError
from cascade.weights import ModelFolder, WeightsError, write_model_json
from cascade.weights.build import describe
from cascade.weights.reading import find_weights
from scripts.save_weights import main
from tests.components import restored_from

SMALL = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 1}
PRIOR = "prior/diffusion_pytorch_model.safetensors"
KEY = "down_blocks.0.0.channelwise.0.weight"


@pytest.fixture(scope="module")
def stored(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, stored in 8 bits by the command."""
    folder = tmp_path_factory.mktemp("eight") / "model"
    before = {file: file.read_bytes() for file in model_folder.rglob("*") if file.is_file()}
    assert main(["--precision", "int8", "--base", str(model_folder), "--output", str(folder)]) == 0
    assert {file: file.read_bytes() for file in before} == before  # its files may be hard links to them
    return folder


@pytest.fixture
def changed(stored: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Tensor]], object]], ModelFolder]:
    """Returns a function that changes the tensors of Stage C, in a copy without checksums."""

    def change(how: Callable[[dict[str, Tensor]], object]) -> ModelFolder:
        folder = shutil.copytree(stored, tmp_path / "changed")
        tensors = load_file(folder / PRIOR)
        how(tensors)
        save_file(tensors, folder / PRIOR)
        return ModelFolder.open(folder, check=False)

    return change


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]) for key, tensor in first.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_and_rounded_weights_are_the_same(model_folder: Path, stored: Path, dtype: torch.dtype) -> None:
    for name in NETWORKS:
        rounded = ModelFolder.open(model_folder).load_component(name, dtype=dtype, precision="int8")
        read = ModelFolder.open(stored).load_component(name, dtype=dtype, precision="int8")
        assert network_precision(rounded) == "int8"
        assert same_weights(rounded, read)
        ordinary = ModelFolder.open(stored).load_component(name, dtype=dtype)
        assert network_precision(ordinary) == "full"
        assert same_weights(ordinary, restored_from(read, ordinary))


def test_other_networks_stay_as_they_are(model_folder: Path, stored: Path) -> None:
    for name in ("vqgan", "effnet", "previewer", "ip_adapter", "controlnet_canny"):
        (file,) = find_weights(stored / name)
        assert file.read_bytes() == find_weights(model_folder / name)[0].read_bytes()


def test_what_is_stored(stored: Path) -> None:
    tensors = load_file(stored / PRIOR)
    assert tensors[KEY].dtype == torch.int8
    assert tensors[f"{KEY}_scale"].dtype == torch.bfloat16
    assert tensors["clip_txt_mapper.weight"].dtype == torch.float32
    for key, tensor in tensors.items():
        assert (tensor.dtype == torch.int8) == (
            key in wanted_forms({key: one.shape for key, one in tensors.items()}, "prior", "int8")
        ), key
    assert len({(stored / name / "config.json").stat().st_mode for name in NETWORKS}) == 1
    assert (stored / PRIOR).stat().st_mode == (stored / "prior" / "config.json").stat().st_mode


def test_a_stored_folder_is_whole(stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ModelFolder.open(stored).verify()
    assert main(["--verify", "--output", str(stored)]) == 0
    again = shutil.copytree(stored, tmp_path / "again")
    assert main(["--precision", "int8", "--output", str(again), "--base", str(tmp_path / "none")]) == 0
    assert (again / PRIOR).read_bytes() == (stored / PRIOR).read_bytes()


def test_shards_become_one_file(model_folder: Path, stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "shards")
    tensors = load_file(folder / PRIOR)
    (folder / PRIOR).unlink()
    ModelFolder.open(model_folder).load_component("prior").save_pretrained(folder / "prior", max_shard_size="100KB")
    assert len(find_weights(folder / "prior")) > 1
    write_model_json(folder, **describe([], model_folder))
    output = tmp_path / "out"
    assert main(["--precision", "int8", "--base", str(folder), "--output", str(output)]) == 0
    assert [file.name for file in sorted((output / "prior").iterdir())] == ["config.json", Path(PRIOR).name]
    assert load_file(output / PRIOR).keys() > tensors.keys()
    for key, tensor in load_file(stored / PRIOR).items():
        assert torch.equal(load_file(output / PRIOR)[key], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
def test_sizes_are_those_of_the_tensors(model_folder: Path, stored: Path, dtype: torch.dtype, precision: str) -> None:
    for folder in (model_folder, stored):
        opened = ModelFolder.open(folder)
        for name in NETWORKS:
            network = opened.load_component(name, dtype=dtype, precision=precision)
            counted = sum(tensor.nbytes for tensor in network.state_dict().values())
            assert opened.size(name, dtype, precision=precision) == counted, name


@pytest.mark.parametrize(
    ("precision", "of_original", "of_stored"),
    [("auto", "full", "int8"), ("full", "full", "full"), ("int8", "int8", "int8")],
)
def test_what_is_loaded(model_folder: Path, stored: Path, precision: str, of_original: str, of_stored: str) -> None:
    for folder, wanted in ((model_folder, of_original), (stored, of_stored)):
        cascade = Cascade.load(folder, "cpu", precision=precision)
        assert cascade.precision == wanted
        for network in (cascade.prior, cascade.decoder, cascade.text.encoder, cascade.image_prompts.encoder):
            assert network_precision(network) == wanted


def test_pictures_do_not_depend_on_what_is_stored(model_folder: Path, stored: Path) -> None:
    request = Request("a b", seed=1, **SMALL)
    made = [
        np.asarray(Cascade.load(folder, "cpu", precision=precision).generate(request)[0], np.int16)
        for folder, precision in ((model_folder, "int8"), (stored, "auto"), (model_folder, "full"))
    ]
    assert np.array_equal(made[0], made[1])
    assert 0 < np.abs(made[0] - made[2]).mean() < 30


def test_unknown_precisions_are_refused(model_folder: Path) -> None:
    with pytest.raises(SettingError, match=r"^precision is 'fp4'; it must be one of auto, full, int8, fp8\.$"):
        Cascade.load(model_folder, "cpu", precision="fp4")


@pytest.mark.parametrize("precision", ["full", "int8", "fp8"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            lambda tensors: tensors.pop(f"{KEY}_scale"),
            rf"has no tensor {KEY}_scale, without which {KEY} cannot be used",
        ),
        (
            lambda tensors: tensors.update({f"{KEY}_scale": tensors[f"{KEY}_scale"].float()}),
            rf"{KEY} and its scale are stored as int8 and float32; they must be int8 and bfloat16, or float8_e4m3fn and float32",
        ),
        (
            lambda tensors: tensors.update({f"{KEY}_scale": tensors[f"{KEY}_scale"][:, :0].contiguous()}),
            rf"{KEY}_scale has the shape \(\d+, 0\) instead of \(\d+, \d+\)",
        ),
        (
            lambda tensors: tensors.update({KEY: tensors[KEY][:-1].contiguous()}),
            rf"{KEY}(_scale)?.* has the shape \(",
        ),
    ],
    ids=["no scale", "another dtype", "another shape", "fewer rows"],
)
def test_damage_is_named(
    changed: Callable[..., ModelFolder], how: Callable[[dict[str, Tensor]], object], said: str, precision: str
) -> None:
    opened = changed(how)
    with pytest.raises(WeightsError, match=rf"prior.*{said}"):
        opened.load_component("prior", precision=precision)


def test_what_8_bits_do_not_have_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_CHECK_WEIGHTS", "0")
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / PRIOR)
    tensors[KEY][0, 0] = torch.nan
    save_file(tensors, folder / PRIOR)
    output = tmp_path / "out"
    assert main(["--precision", "int8", "--base", str(folder), "--output", str(output)]) == 1
    assert f"prior cannot be stored in 8 bits: {KEY} holds infinite or NaN values." in capsys.readouterr().err
    assert not output.exists()


def test_a_network_in_8_bits_may_be_taken_from_another_folder(
    model_folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["--prior", str(stored / "prior"), "--base", str(model_folder), "--output", str(output)]) == 0
    made, original = (ModelFolder.open(folder).load_component("prior") for folder in (output, stored))
    for key, tensor in original.state_dict().items():
        assert torch.equal(made.state_dict()[key], tensor.bfloat16().float()), key  # large networks get 16 bits
    tensors = load_file(stored / PRIOR)
    tensors[f"{KEY}_scale"] = tensors[f"{KEY}_scale"][:-1].contiguous()
    shutil.copytree(stored / "prior", tmp_path / "wrong")
    save_file(tensors, tmp_path / "wrong" / Path(PRIOR).name)
    assert main(["--prior", str(tmp_path / "wrong"), "--base", str(model_folder), "--output", str(output)]) == 1
    assert f"{KEY} has scales of the shape" in capsys.readouterr().err
