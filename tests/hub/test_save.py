"""scripts/save-weights: model folders from good and bad downloads. Folders from good ones make pictures."""

import errno
import hashlib
import json
import os
import pty
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from cascade.guides.controls import Control
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.precisions import network_precision
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.safety import SafetyChecker
from cascade.weights import DISTILLED, PUBLISHED_SAMPLER, ModelFolder
from cascade.weights.published import PARTS
from predict import Predictor
from scripts.save_weights import main
from tests.hub.conftest import Script
from tests.hub.repositories import SMALL, write_download
from tests.hub.serving import Hub
from tests.test_predict import TINY, run

Run = Callable[..., str]

EVERYTHING = [name for name in PARTS if not name.endswith("_lite")]
FULL = [name for name in EVERYTHING if name != "effnet"]  # which is large
LITE = ["tokenizer", "text_encoder", "prior_lite", "decoder_lite", "vqgan"]
PRIOR = "stable-cascade-prior/prior/diffusion_pytorch_model.bf16.safetensors"
VQGAN = "stable-cascade/vqgan/diffusion_pytorch_model.bf16.safetensors"
TEXT_ENCODER = "stable-cascade-prior/text_encoder/model.bf16.safetensors"
PREVIEWER = "stable-cascade/previewer.safetensors"
CANNY = "stable-cascade/controlnet/canny.safetensors"


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloads ``full`` and ``lite``. Tests must not change them."""
    root = tmp_path_factory.mktemp("downloads")
    write_download(root / "full", FULL, SMALL)
    write_download(root / "lite", LITE, SMALL)
    return root


@pytest.fixture
def full(downloads: Path, tmp_path: Path) -> Path:
    """A download whose files tests may replace, but not write to."""
    return shutil.copytree(downloads / "full", tmp_path / "full", copy_function=os.link)


@pytest.fixture
def lite(downloads: Path, tmp_path: Path) -> Path:
    return shutil.copytree(downloads / "lite", tmp_path / "lite", copy_function=os.link)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights" / "model"


@pytest.fixture
def fails(target: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Save a download, which must fail and change nothing. Returns the sentence."""

    def fails(download: Path) -> str:
        before = snapshot(target), snapshot(download)
        capsys.readouterr()
        assert main(["--download", str(download), "--output", str(target)]) == 1
        assert (snapshot(target), snapshot(download)) == before
        assert not target.parent.exists() or set(target.parent.iterdir()) <= {target}
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()[-1]

    return fails


def save_weights(download: Path, target: Path, *options: str) -> None:
    assert main(["--download", str(download), "--output", str(target), *options]) == 0


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and modification time of every file below a folder."""
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def replace(download: Path, path: str, content: bytes) -> None:
    """Replace a file of a download, together with its checksum."""
    scratch = download / "scratch"
    scratch.write_bytes(content)
    scratch.replace(download / path)
    manifest = json.loads((download / "download.json").read_text())
    manifest["files"][path] = hashlib.sha256(content).hexdigest()
    (download / "download.json").unlink()
    (download / "download.json").write_text(json.dumps(manifest))


def change_tensors(download: Path, path: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(download / path)
    change(tensors)
    replace(download, path, save(tensors, metadata={"format": "pt"}))


def make_picture(folder: Path, **inputs: Any) -> np.ndarray:
    loaded = Cascade.load(folder)
    assert loaded.stage_a_scale == 0.43
    (image,) = loaded.generate(Request("A thin thing", width=136, height=72, steps_prior=2, steps_decoder=1, **inputs))
    assert image.size == (136, 72)
    return np.asarray(image)


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_from_the_hub_to_a_picture(tmp_path: Path, hub: Hub, succeed: Run) -> None:
    """Runs both scripts with all options, from the Hub to a picture."""
    download, target = tmp_path / "download", tmp_path / "weights" / "model"
    succeed("download-weights", "--output", download, "--with", "safety,controlnet,effnet,previewer,image-encoder")
    assert "stabilityai/stable-cascade/effnet_encoder.safetensors" in hub.fetched()
    log = succeed("save-weights", "--download", download, "--output", target)
    assert log.splitlines()[-1].startswith(f"{target} is complete: ")
    assert os.listdir(target.parent) == ["model"]

    folder = ModelFolder.open(target)
    folder.verify()
    assert set(folder.checksums) == files_of(target) - {"model.json"}
    assert (folder.name, folder.native_size, folder.sampler) == ("Stable Cascade", 1024, PUBLISHED_SAMPLER)
    assert folder.license == "Stability AI Non-Commercial Research Community License"
    assert set(os.listdir(target)) == {*EVERYTHING, "model.json"}
    for name in EVERYTHING:
        part = PARTS[name]
        if part.is_checkpoint:
            made = target / name / "diffusion_pytorch_model.safetensors"
            assert made.stat().st_mode == (target / name / "config.json").stat().st_mode
            ours, theirs = load_file(made), load_file(download / part.paths[0])
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            continue
        for path in part.paths:
            assert (target / part.component / Path(path).name.replace(".bf16.", ".")).samefile(download / path)
    assert (download / "download.json").is_file()  # as nobody was asked

    plain = make_picture(target)
    assert plain.std() > 1
    controlled = make_picture(target, controls=(Control("canny", Image.linear_gradient("L")),))
    assert (controlled != plain).any()
    SafetyChecker.load(target / "safety_checker")


def test_the_lite_networks(lite: Path, target: Path) -> None:
    save_weights(lite, target)
    folder = ModelFolder.open(target)
    folder.verify()
    assert folder.name == "Stable Cascade (lite prior and decoder)"
    assert list(folder.load_component("prior").config.block_out_channels) == [8, 8]
    assert list(folder.load_component("decoder").config.block_out_channels) == [8, 8, 8, 8]
    assert make_picture(target).std() > 1


def test_a_download_in_8_bits(lite: Path, target: Path) -> None:
    before = snapshot(lite)
    save_weights(lite, target, "--precision", "int8")
    assert snapshot(lite) == before
    folder = ModelFolder.open(target)
    folder.verify()
    assert network_precision(folder.load_component("decoder", precision="int8")) == folder.precision() == "int8"
    assert make_picture(target).std() > 1
    # The same command in full makes it anew from the download.
    save_weights(lite, target)
    assert ModelFolder.open(target).precision() == "full"


def test_an_adapter_for_few_steps(lite: Path, target: Path) -> None:
    """It stays as long as Stages C and B do."""
    save_weights(lite, target)
    (target / DISTILLED).parent.mkdir()
    (target / DISTILLED).write_bytes(save({"prior.x.lora_A.weight": torch.zeros(1, 1)}))
    save_weights(lite, target)
    assert ModelFolder.open(target).distilled() is not None
    change_tensors(lite, PARTS["prior_lite"].paths[1], lambda tensors: next(iter(tensors.values())).add_(1))
    save_weights(lite, target)
    assert ModelFolder.open(target).distilled() is None


def test_a_predictor_of_it(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_download(tmp_path / "download", [*LITE, "safety_checker"], SMALL)
    save_weights(tmp_path / "download", target)
    monkeypatch.setenv("CASCADE_WEIGHTS", str(target))
    predictor = Predictor()
    predictor.setup()
    assert f"Loaded Stable Cascade (lite prior and decoder) from {target}" in caplog.text
    assert predictor.service.safety is not None
    monkeypatch.setattr(predictor, "record_metric", lambda *_: None)  # outside of its server, Cog's scope keeps nothing
    (picture,) = run(predictor, **TINY)
    assert picture.is_file()


def test_additions(lite: Path, tmp_path: Path, target: Path) -> None:
    """Additions keep the other files and the name. A change of the stages keeps additions."""
    save_weights(lite, target)
    (target / "README.md").write_text("mine")
    before = snapshot(target)
    write_download(tmp_path / "more", ["previewer", "safety_checker"], SMALL)
    save_weights(tmp_path / "more", target)
    folder = ModelFolder.open(target)
    folder.verify()
    assert folder.name == "Stable Cascade (lite prior and decoder)"
    assert set(folder.parts) == {PARTS[name].component for name in LITE} | {"previewer"}
    assert SafetyChecker.load(target / "safety_checker")
    after = snapshot(target)
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {str(target / "model.json")}

    write_download(tmp_path / "stages", ["tokenizer", "text_encoder", "prior", "decoder_lite", "vqgan"], SMALL)
    save_weights(tmp_path / "stages", target)
    folder = ModelFolder.open(target)
    folder.verify()
    assert folder.name == "Stable Cascade (lite decoder)"
    assert list(folder.load_component("prior").config.block_out_channels) == [16, 16]
    assert "previewer" in folder
    assert (target / "README.md").read_text() == "mine"


def test_additions_to_nothing(target: Path, tmp_path: Path, fails: Callable[[Path], str]) -> None:
    write_download(tmp_path / "more", ["previewer", "text_encoder"], SMALL)
    assert fails(tmp_path / "more") == (
        f"{tmp_path / 'more'} has no tokenizer, vqgan, prior, decoder, and neither has {target}: run "
        "scripts/download-weights without --only."
    )


def test_a_link_to_a_folder_elsewhere(lite: Path, target: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "large disk" / "model"
    elsewhere.mkdir(parents=True)
    target.parent.mkdir()
    target.symlink_to(elsewhere)
    for _ in range(2):
        save_weights(lite, target)
        assert target.is_symlink()
        ModelFolder.open(elsewhere).verify()
        assert os.listdir(target.parent) == os.listdir(elsewhere.parent) == ["model"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_copies_where_the_disk_has_no_links(full: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert Path(other).stat().st_dev != full.stat().st_dev
        target = Path(other) / "model"
        save_weights(full, target)
        ModelFolder.open(target).verify()
        assert (target / "prior" / "config.json").stat().st_nlink == 1


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["clf.1.bias"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["surplus.weight"] = torch.zeros(1)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["clf.1.bias"] = torch.zeros(1, 16, dtype=torch.bfloat16)


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["clf.1.bias"] = tensors["clf.1.bias"].float()


def forget_projection(tensors: dict[str, Tensor]) -> None:
    del tensors["text_projection.weight"]


def halve(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.bias"] = tensors["blocks.0.bias"].half()


def narrow_statistics(tensors: dict[str, Tensor]) -> None:
    tensors["down_blocks.3.1.running_mean"] = tensors["down_blocks.3.1.running_mean"].half()


def transpose(tensors: dict[str, Tensor]) -> None:
    tensors["projections.3.2.weight"] = tensors["projections.3.2.weight"].transpose(0, 1).contiguous()


def narrow_controlnet(tensors: dict[str, Tensor]) -> None:
    tensors["projections.0.0.weight"] = tensors["projections.0.0.weight"].bfloat16()


def cut_projection(tensors: dict[str, Tensor]) -> None:
    del tensors["projections.7.2.weight"]


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        (PRIOR, drop, " has no tensor clf.1.bias."),
        (PRIOR, add, " has a tensor surplus.weight, which its network does not have."),
        (PRIOR, reshape, ": clf.1.bias has the shape (1, 16) instead of (16,)."),
        (PRIOR, widen, ": clf.1.bias has the dtype F32 instead of BF16."),
        (TEXT_ENCODER, forget_projection, " has no tensor text_projection.weight."),
        (VQGAN, narrow_statistics, ": down_blocks.3.1.running_mean has the dtype F16 instead of BF16."),
        (PREVIEWER, halve, ": blocks.0.bias has the dtype F16 instead of F32."),
        (CANNY, transpose, ": projections.3.2.weight has the shape (1, 16, 1, 1) instead of (16, 1, 1, 1)."),
        (CANNY, narrow_controlnet, ": projections.0.0.weight has the dtype BF16 instead of F32."),
        (
            CANNY,
            cut_projection,
            " holds no published ControlNet. The ControlNet has 7 projections, for ResBlocks (0, 4, 8, 12, 51, 55, 59, 63).",
        ),
    ],
)
def test_wrong_tensors(
    full: Path,
    fails: Callable[[Path], str],
    path: str,
    change: Callable[[dict[str, Tensor]], None],
    problem: str,
) -> None:
    change_tensors(full, path, change)
    assert fails(full) == f"{full / path}{problem}"


def test_controlnets_that_were_mixed_up(full: Path, fails: Callable[[Path], str]) -> None:
    replace(full, CANNY, (full / "stable-cascade/controlnet/inpainting.safetensors").read_bytes())
    assert fails(full) == f"{full / CANNY} is not a controlnet_canny: it reads 4 channels, not 1."


def test_harmless_differences(lite: Path, target: Path) -> None:
    """Old checkpoints hold an obsolete buffer or lack counters, and statistics may be float32."""

    def add_position_ids(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def widen_statistics(tensors: dict[str, Tensor]) -> None:
        tensors["down_blocks.3.1.running_mean"] = tensors["down_blocks.3.1.running_mean"].float()
        del tensors["down_blocks.3.1.num_batches_tracked"]

    change_tensors(lite, TEXT_ENCODER, add_position_ids)
    change_tensors(lite, VQGAN, widen_statistics)
    save_weights(lite, target)
    assert make_picture(target).std() > 1


@pytest.mark.parametrize(
    ("path", "content", "sentence"),
    [
        (PRIOR, b"pickle", "{file} is truncated or no safetensors file: "),
        (CANNY, b"8" * 100, "{file} is truncated or no safetensors file: "),
        ("stable-cascade-prior/prior/config.json", b"{", "{file} is not valid JSON: "),
        (
            "stable-cascade-prior/prior/config.json",
            b'{"block_out_channels": [8]}',
            "{file} does not describe the prior: num_attention_heads has 2 values; block_out_channels has 1, one per level.",
        ),
        ("stable-cascade-prior/tokenizer/tokenizer.json", b"{}", "{file.parent} holds no readable tokenizer: "),
        (
            "stable-cascade-prior/feature_extractor/preprocessor_config.json",
            b"[",
            "{file.parent} holds no readable feature_extractor: ",
        ),
        ("nsfw_image_detection/config.json", b"{}", "{file.parent} holds no readable image classifier: "),
    ],
)
def test_files_that_are_something_else(
    full: Path, fails: Callable[[Path], str], path: str, content: bytes, sentence: str
) -> None:
    replace(full, path, content)
    assert fails(full).startswith(sentence.format(file=full / path))


def test_missing_and_damaged_files(full: Path, target: Path, fails: Callable[[Path], str]) -> None:
    """An older model folder is not changed, either."""
    save_weights(full, target)
    file = full / PRIOR
    content = file.read_bytes()
    file.unlink()
    assert fails(full) == f"{file} is missing: run scripts/download-weights again."
    file.write_bytes(content[:-1] + b"?")
    assert fails(full) == f"{file} is damaged: delete it, and run scripts/download-weights again."
    ModelFolder.open(target).verify()


@pytest.mark.parametrize("content", ["", "[]", '{"parts": ["face"], "files": {}}', '{"parts": ["prior"], "files": {}}'])
def test_a_damaged_list(full: Path, fails: Callable[[Path], str], content: str) -> None:
    file = full / "download.json"
    file.unlink()
    assert fails(full) == f"{full} holds no complete download: run scripts/download-weights first."
    file.write_text(content)
    assert fails(full) == f"{file} is damaged: delete it, and run scripts/download-weights again."


def test_a_folder_of_something_else(full: Path, target: Path, fails: Callable[[Path], str]) -> None:
    (target / "prior").mkdir(parents=True)
    (target / "prior" / "thesis.txt").write_text("mine")
    assert fails(full) == f"{target} is not a model folder, and not empty: name another folder with --output."


def test_a_disk_that_fills_up(full: Path, lite: Path, target: Path, fails: Callable[[Path], str]) -> None:
    """With a limit on the process's files, the system refuses to write, like with a full disk."""
    save_weights(lite, target)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        sentence = fails(full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sentence.startswith(f"{target} cannot be written: ")
    assert "File too large" in sentence


def test_interrupted(full: Path, target: Path, start: Script) -> None:
    process = start("save-weights", "--download", full, "--output", target)
    for line in process.stderr:
        if line == "Checking text_encoder.\n":
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.splitlines()[-1] == f"Interrupted. {target} is as it was."
    assert not target.parent.exists()


def test_a_place_that_cannot_be_written(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "model"
    assert main(["--download", str(full), "--output", str(target)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"{target.parent} cannot be written: {os.strerror(errno.EEXIST)}."
    )


def test_the_download_is_removed_when_told(full: Path, target: Path) -> None:
    """Including remains of earlier downloads, but no other files."""
    write_download(full, LITE, SMALL)
    (full / f"{PRIOR}.0123456789ab.incomplete").write_text("the beginning")
    (full / ".lock").touch()
    (full / "stable-cascade" / "prior").mkdir()
    (full / "stable-cascade" / "notes.txt").write_text("mine")
    save_weights(full, target, "--remove-download")
    assert files_of(full) == {"stable-cascade/notes.txt"}
    assert {path.name for path in full.rglob("*")} == {"stable-cascade", "prior", "notes.txt"}
    ModelFolder.open(target).verify()
    assert make_picture(target).std() > 1


@pytest.mark.parametrize(
    ("answer", "removed"), [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("\x04", False)]
)
def test_a_person_is_asked(
    lite: Path,
    target: Path,
    answer: str,
    removed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keyboard, terminal = pty.openpty()
    os.write(keyboard, answer.encode())
    with open(terminal) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        save_weights(lite, target)
    os.close(keyboard)
    assert capsys.readouterr().out == f"Remove the download in {lite}? [y/N] "
    assert lite.exists() is not removed
    ModelFolder.open(target).verify()


def test_sizes_of_the_published_files() -> None:
    """Exact to the byte, as in https://huggingface.co/stabilityai/stable-cascade when it was published."""
    metadata = {"format": "pt"}
    assert len(save(StageA().to(torch.bfloat16).state_dict(), metadata)) == 36_825_828
    # Without the metadata that these got later.
    assert len(save(SemanticEncoder().state_dict())) == 81_486_184
    assert len(save(Previewer().state_dict())) == 15_939_892
