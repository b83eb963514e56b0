"""Training on a few pictures of one's own, on a CPU: every stage works; what is wrong is one sentence that names it."""

import json
import logging
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from PIL import Image

from cascade.weights import ModelFolder
from scripts import encode_pictures, train_lora, train_mini
from serving.vocabulary import FILE as VOCABULARY
from tests.conftest import MINI
from tests.miniature.small import DRAWN
from tests.training.small import train, write_config, write_pictures
from training import assemble, run, statistics
from training.configuration import read_configuration
from training.dataset import Dataset
from training.latents import Encoded
from training.options import Options
from training.picture_folder import captioned_pictures, split_pictures
from training.shapes import Shapes
from training.statistics import statistics_batches
from training.workshop import Workshop

COUNT = 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, a few steps each, on 40 pictures."""
    folder = tmp_path_factory.mktemp("own")
    pictures = write_pictures(folder / "pictures", COUNT)
    config = write_config(folder, "vision.task.naming = 0.0")
    contacted: list[object] = []
    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "BATCHES", 4)  # 40 take as long as all of the training
        patch.setattr(socket.socket, "connect", lambda self, to: (contacted.append(to), connect(self, to))[1])
        for stage in run.ORDER:
            assert train(config, stage, pictures, folder / "run") == 0
    assert not contacted
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", run.ORDER)
def test_every_stage_finishes(trained: Path, stage: str) -> None:
    assert (trained / "run" / stage / run.FINISHED).is_file()


@pytest.mark.slow
def test_a_model_folder_is_made_of_them(trained: Path, tmp_path: Path) -> None:
    files = [str(trained / "config.toml"), str(trained / "run" / "model"), str(tmp_path / "weights")]
    assert assemble.main(files) == 0
    ModelFolder.open(tmp_path / "weights").verify()


@pytest.mark.slow
def test_one_call_makes_a_model_folder_of_them(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``scripts/train-mini``, on a folder of pictures instead of the drawings."""
    output = shutil.copytree(trained / "run", tmp_path / "run")
    files = ["--config", trained / "config.toml", "--data", trained / "pictures", "--output", output]
    assert train_mini.main([*map(str, files)]) == 0
    assert capsys.readouterr().out.endswith(f"{output / 'weights'}\n")
    ModelFolder.open(output / "weights").verify()
    made = json.loads((output / "weights" / train_mini.COSTS).read_text())
    assert tuple(made["stages"]) == tuple(run.STAGES)
    assert not (output / "weights" / VOCABULARY).exists()  # nobody knows what words one's own captions could have had


@pytest.mark.parametrize(("name", "source"), [("picures", DRAWN), ("picures.zip", "")])
def test_one_call_on_pictures_that_are_not_there(
    tmp_path: Path, name: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not draw the miniature's data in their place."""
    config = write_config(tmp_path, source)
    files = ["--config", config, "--data", tmp_path / name, "--output", tmp_path / "run"]
    assert train_mini.main([*map(str, files)]) == 1
    assert capsys.readouterr().err.startswith(f"There is no {tmp_path / name}; --data must be a folder of ")
    assert not (tmp_path / name).exists()


@pytest.mark.slow
def test_the_log_says_what_it_does(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run" / "model" / "tokenizer", tmp_path / "model" / "tokenizer")
    with caplog.at_level(logging.INFO):
        assert train(trained / "config.toml", "clip", trained / "pictures", tmp_path) == 0
    assert "2 steps of 4, on 36 pictures and 4 held-out ones" in caplog.text
    assert "clip: not compiled, because there is no GPU." in caplog.text
    (figures,) = [message for message in caplog.messages if "unseen_accuracy" in message]
    assert re.fullmatch(
        r"clip: step 2: unseen_loss [\d.]+, unseen_accuracy [\d.]+ \(on 4 held-out pictures, too few to say much\)",
        figures,
    )
    # What the libraries say of files concerns a scratch folder that is gone, and takes a moment.
    assert train(trained / "config.toml", "stage_a", trained / "pictures", tmp_path) == 0
    assert "saved to" not in caplog.text
    assert not re.search(r"(Loading|Writing) \w+", capsys.readouterr().err)


def train_tokenizer(folder: Path, output: Path) -> int:
    return train(folder / "config.toml", "tokenizer", folder / "pictures", output)


def train_lora_of(folder: Path, output: Path) -> int:
    return train_lora.main([str(folder / "pictures"), f"--weights={MINI}", "--steps=1", f"--output={output}"])


def encode(folder: Path, output: Path) -> int:
    return encode_pictures.main([str(folder / "pictures"), str(output), f"--weights={MINI}", "--resolution=128"])


@pytest.mark.slow
@pytest.mark.parametrize("call", [train_tokenizer, train_lora_of, encode])
def test_accelerate_launch_starts_one_process_without_gpus_and_training_says_so(
    call: Callable[[Path, Path], int],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In this process, with the variables that the launcher would give to the one that it starts."""
    given = ["--num_processes", "2", "--cpu", "-m", "training.run", "config.toml", "tokenizer"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    assert not options.multi_gpu
    command, variables = prepare_simple_launcher_cmd_env(options)
    assert command == [sys.executable, *given[3:]]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)  # so that they are read
    try:
        assert call(trained, tmp_path / "made") == 0
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    said = "Only one process runs: without GPUs, accelerate launch starts no more."
    assert sum(said in message for message in caplog.messages) == 1


NEEDS = {
    "stage_a": "tokenizer",
    "clip": "tokenizer",
    "vision": "tokenizer, clip",
    "semantic": "tokenizer, stage_a, clip",
    "stage_b": "tokenizer, stage_a, clip, semantic",
    "stage_c": "tokenizer, clip, semantic",
    "previewer": "tokenizer, semantic",
    "controlnet_canny": "tokenizer, clip, semantic, stage_c",
    "controlnet_inpainting": "tokenizer, clip, semantic, stage_c",
    "ip_adapter": "tokenizer, clip, semantic, stage_c",
    "distil_c": "tokenizer, clip, semantic, stage_c",
    "distil_b": "tokenizer, stage_a, clip, semantic",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", run.STAGES)
def test_a_stage_before_those_it_needs(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    assert train(trained / "config.toml", stage, trained / "pictures", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{stage} needs tokenizer")
    assert said.endswith(f"{'stages' if ',' in NEEDS[stage] else 'stage'} {NEEDS[stage]} first.\n")
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", run.STAGES)
def test_the_seed_decides_what_a_stage_begins_with(tmp_path: Path, trained: Path, stage: str) -> None:
    """Whatever was drawn before its networks are built."""
    model, plan = tmp_path / "model", run.STAGES[stage]
    model.mkdir()
    for component in (trained / "run" / "model").iterdir():
        if plan.further or component.name not in plan.trains:
            (model / component.name).symlink_to(component)
    shop = Workshop(read_configuration(trained / "config.toml"), trained / "pictures", tmp_path, torch.device("cpu"))
    tasks = []
    for draw in range(2):
        torch.manual_seed(draw)
        tasks.append(shop.build(stage, Options(**shop.config[stage]["options"]), resumes=False).state_dict())
    for name, value in tasks[0].items():
        assert torch.equal(value, tasks[1][name]), name


@pytest.mark.slow
def test_assembling_before_training(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert assemble.main([str(trained / "config.toml"), str(tmp_path / "none"), str(tmp_path / "weights")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'none'} has no tokenizer, text_encoder, image_encoder, prior, decoder, vqgan")
    assert said.endswith(": run the stages tokenizer, stage_a, clip, semantic, stage_c first.\n")
    assert not (tmp_path / "weights").exists()


def cut(folder: Path) -> None:
    file = folder / "03.png"
    file.write_bytes(file.read_bytes()[:-60])


def link(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


FAULTS = {
    "no caption": (
        lambda folder: (folder / "03.txt").unlink(),
        "03.png has no caption; it must be beside it, in 03.txt.",
    ),
    "caption in Latin-1": (
        lambda folder: (folder / "03.txt").write_bytes(b"caf\xe9"),
        "03.txt is not UTF-8: byte 4 is 0xe9.",
    ),
    "cut picture": (cut, "pictures/03.png is a damaged PNG file."),
    "no picture": (
        lambda folder: (folder / "03.png").write_text("text"),
        "pictures/03.png is not a picture in one of the",
    ),
    "broken link": (lambda folder: link(folder / "03.png", "none.png"), "03.png cannot be read: No such file"),
    # A file that even root cannot read from its beginning.
    "unreadable caption": (lambda folder: link(folder / "03.txt", "/proc/self/mem"), "03.txt cannot be read: "),
    "empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], "pictures holds no pictures (.jpg,"),
    "no folder": (
        shutil.rmtree,
        "pictures; --data must be a folder of captioned pictures, or a path that [data] source reads.",
    ),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("text")),
        "pictures is not a folder of pictures, and [data] names no source",
    ),
    "one picture": (
        lambda folder: [file.unlink() for file in folder.iterdir() if not file.name.startswith("03")],
        "pictures holds only one picture; training needs another one to evaluate on.",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_data(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    spoil, sentence = FAULTS[fault]
    pictures = write_pictures(tmp_path / "pictures", 6)
    spoil(pictures)
    shutil.copytree(trained / "run" / "model" / "tokenizer", tmp_path / "run" / "model" / "tokenizer")
    assert train(trained / "config.toml", "stage_a", pictures, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run" / "stage_a").exists()


@pytest.mark.slow
def test_folders_and_what_is_hidden_are_no_pictures(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "drawings.png").mkdir()
    for hidden in (".thumbnails", ".thumbnails/deeper", "__MACOSX"):
        (folder / hidden).mkdir()
        shutil.copy(folder / "00.png", folder / hidden / "00.png")
    shutil.copytree(folder, tmp_path / ".data" / "pictures")  # its own path may have such a name
    for one in (folder, tmp_path / ".data" / "pictures"):
        assert [file.name for file, _ in captioned_pictures(one)] == ["00.png", "01.png"]


def test_pictures_are_looked_at_once_and_again_after_a_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, config = write_pictures(tmp_path / "pictures", 6), write_config(tmp_path)
    (pictures / "._00.png").write_text("what a Mac leaves on other systems")
    (pictures / "00.txt").write_text("a red square", encoding="utf-8-sig")
    assert train(config, "tokenizer", pictures, tmp_path / "run") == 0
    record = tmp_path / "run" / "pictures-read"
    before = record.stat().st_mtime_ns
    assert train(config, "tokenizer", pictures, tmp_path / "run") == 0
    assert record.stat().st_mtime_ns == before
    cut(pictures)
    assert train(config, "tokenizer", pictures, tmp_path / "run") == 1
    assert "pictures/03.png is a damaged PNG file." in capsys.readouterr().err


@pytest.mark.slow
def test_damaged_components_are_named(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "run" / "model", tmp_path / "run" / "model")
    file = tmp_path / "run" / "model" / "effnet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert train(trained / "config.toml", "stage_c", trained / "pictures", tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"{file.parent} cannot be read (")
    assert said.endswith("); remove it and run the stage semantic again.\n")


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, 1), (3, 1), (6, 2), (12, 4), (40, 4), (100, 4), (200, 4), (10_000, 200)]
)
def test_some_pictures_are_held_out(count: int, held_out: int) -> None:
    pictures = [(Path(f"{index}.png"), "") for index in range(count)]
    unseen, seen = (split_pictures(pictures, split) for split in ("heldout", "train"))
    assert len(unseen) == held_out
    assert sorted([*unseen, *seen]) == sorted(pictures)


class Gray(Dataset):
    def __init__(self, count: int, tokenizer: object) -> None:
        super().__init__([""] * count, tokenizer, (64, 64), torch.device("cpu"))

    def images(self, indices: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        return indices.float().view(-1, 1, 1, 1).expand(-1, 3, *(size or self.size)) / len(self)


@pytest.mark.parametrize("count", [1, 2, 5, 23, 24, 100])
def test_every_size_has_pictures_however_few_there_are(components: dict[str, object], count: int) -> None:
    shapes = Shapes((64, 64), ((96, 64), (64, 96), (128, 128)), every=2)
    data = Encoded(Gray(count, components["tokenizer"]), shapes, components["text_encoder"], lambda pixels: (pixels,))
    for index in range(12):
        indices, (pixels,) = data.draw(index, 4, torch.Generator().manual_seed(index))
        assert pixels.shape[-2:] == shapes.at(index)
        assert indices.max() < count


def test_a_contrast_of_few_pictures_has_none_twice(components: dict[str, object]) -> None:
    data = Gray(40, components["tokenizer"])
    for size, expected in ((16, 16), (40, 40), (768, 40)):
        drawn = data.draw_different(size, torch.Generator().manual_seed(0)).tolist()
        assert len(drawn) == len(set(drawn)) == expected
    many = Gray(100 * 4, components["tokenizer"])
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(many.draw_different(4, generator), many.draw(4, generator))


def test_statistics_of_few_pictures_take_few_batches(components: dict[str, object]) -> None:
    task = torch.nn.Module()
    for count, batch, expected in ((40, 16, 5), (40, 512, 4), (4000, 16, 40)):
        task.dataset = Gray(count, components["tokenizer"])
        assert statistics_batches(task, batch) == expected


@pytest.mark.slow
def test_sheets_of_few_pictures_can_be_opened(trained: Path) -> None:
    for file in (trained / "run").glob("*/samples/*.png"):
        with Image.open(file) as sheet:
            assert min(sheet.size) > 0
