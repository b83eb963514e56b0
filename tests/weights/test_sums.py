"""Checksums of pieces: they cover every byte of a file, and loading compares them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from cascade.weights import ModelFolder, WeightsError
from cascade.weights.reading import Sums, read_tensors
from cascade.weights.sums import divide, sums_of
from scripts.save_weights import main

PRIOR = "prior/diffusion_pytorch_model.safetensors"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 2), (4, 2, 3)]
FILES = st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), max_size=8)


def make_tensors(kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"layer.{n}": torch.randint(0, 2, shape).to(dtype) for n, (dtype, shape) in enumerate(kinds)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sums")


@settings(deadline=None, max_examples=60)
@given(FILES, st.integers(1, 100))
def test_pieces_are_the_file_from_its_first_byte_to_its_last(folder: Path, kinds: list, least: int) -> None:
    file = folder / "a.safetensors"
    tensors = make_tensors(kinds)
    save_file(tensors, file)
    content, end = file.read_bytes(), 0
    for piece, told in zip(divide(file, least), sums_of(file, least), strict=True):
        start, end = end, end + len(piece.header) + sum(tensors[key].nbytes for key in piece.keys)
        assert told == xxhash.xxh3_64(content[start:end]).hexdigest()
    assert end == len(content)


@settings(deadline=None, max_examples=60)
@given(FILES, st.integers(1, 100), st.data())
def test_a_changed_byte_anywhere_is_noticed(folder: Path, kinds: list, least: int, data: st.DataObject) -> None:
    file = folder / "b.safetensors"
    content = save(make_tensors(kinds))
    file.write_bytes(content)
    sums = {file: Sums(sums_of(file, least), folder / "model.json", least)}
    assert read_tensors([file], sums=sums).keys() == make_tensors(kinds).keys()
    where = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:where] + bytes([content[where] ^ data.draw(st.integers(1, 255))]) + content[where + 1 :])
    with pytest.raises(WeightsError, match=r"b\.safetensors is (damaged|truncated)") as caught:
        read_tensors([file], sums=sums)
    assert len(str(caught.value)) < 400 + 2 * len(str(folder))


def test_pieces_that_changed_places_are_noticed(folder: Path) -> None:
    file = folder / "c.safetensors"
    save_file({"a": torch.zeros(64), "b": torch.ones(64)}, file)
    sums = {file: Sums(sums_of(file, 256), folder / "model.json", 256)}
    save_file({"a": torch.ones(64), "b": torch.zeros(64)}, file)
    with pytest.raises(WeightsError, match="damaged at its beginning"):
        read_tensors([file], sums=sums)


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "copy")


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-len(content) // 4 :] = bytes(len(content) // 4)
    file.write_bytes(content)


@pytest.mark.parametrize("component", ["prior", "decoder", "text_encoder", "vqgan", "effnet"])
def test_damage_is_noticed_when_a_network_is_loaded(copy: Path, component: str) -> None:
    (file,) = (copy / component).glob("*.safetensors")
    damage(file)
    opened = ModelFolder.open(copy)
    with pytest.raises(
        WeightsError, match=rf"{file} is damaged at .* differs from the checksums in {copy}/model\.json"
    ):
        opened.load_component(component)
    opened.load_component("previewer")


def test_small_files_are_compared_by_their_sha256(copy: Path) -> None:
    for component, name in (("prior", "config.json"), ("tokenizer", "tokenizer.json")):
        file = copy / component / name
        file.write_text(file.read_text() + " ")
        with pytest.raises(WeightsError, match=rf"{file} is damaged: its checksum is not the one in"):
            ModelFolder.open(copy).load_component(component)


def test_checks_can_be_turned_off(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(copy / PRIOR)
    monkeypatch.setenv("CASCADE_CHECK_WEIGHTS", "0")
    ModelFolder.open(copy).load_component("prior")
    with pytest.raises(WeightsError, match="damaged"):
        ModelFolder.open(copy, check=True).load_component("prior")
    monkeypatch.setenv("CASCADE_CHECK_WEIGHTS", "no")
    with pytest.raises(WeightsError, match=r"CASCADE_CHECK_WEIGHTS is 'no'; it must be 1, or 0 for no checks\."):
        ModelFolder.open(copy)
    ModelFolder.open(copy, check=False).load_component("prior")


def test_folders_of_older_versions_say_that_they_cannot_be_checked(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = json.loads((copy / "model.json").read_text())
    pieces = content.pop("pieces")
    caplog.set_level("INFO")
    for other in (None, {**pieces, "algorithm": "xxh9"}):
        (copy / "model.json").write_text(json.dumps(content if other is None else {**content, "pieces": other}))
        caplog.clear()
        opened = ModelFolder.open(copy)
        opened.require()
        assert caplog.messages == [f"The weights in {copy} have no checksums, so damage to them is not detected."]
        opened.load_component("prior")


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        {},
        {"algorithm": "xxh3_64", "bytes": "a", "sums": {"a": ""}},
        {"algorithm": "xxh3_64", "bytes": 1, "sums": {"a": 3}},
    ],
)
def test_wrong_pieces_in_model_json(copy: Path, pieces: object) -> None:
    content = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**content, "pieces": pieces}))
    with pytest.raises(WeightsError, match=r"model\.json lacks a field or has one of the wrong kind"):
        ModelFolder.open(copy)


def test_verifying_adds_what_older_versions_did_not_list(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({key: value for key, value in before.items() if key != "pieces"}))
    for _ in range(2):
        assert main(["--verify", "--output", str(copy)]) == 0
        assert json.loads((copy / "model.json").read_text()) == before
    damage(copy / PRIOR)
    assert main(["--verify", "--output", str(copy)]) == 1
    assert capsys.readouterr().err.startswith(f"{copy / PRIOR} has the checksum ")
