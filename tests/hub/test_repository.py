"""Other repositories than the published: mirrors of these, and fine-tuned networks."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cascade.weights import ModelFolder
from cascade.weights.published import DECODER, PRIOR
from scripts.save_weights import main
from tests.hub.repositories import SMALL, write_download
from tests.hub.serving import Hub, list_repository

Run = Callable[..., str]
NEEDED = {"tokenizer", "text_encoder", "prior", "decoder", "vqgan"}
WEIGHTS = "prior/diffusion_pytorch_model.bf16.safetensors"


@pytest.fixture
def mirrors(hub: Hub) -> tuple[str, str]:
    """Both published repositories, under another owner and at another revision."""
    for repository in (PRIOR, DECODER):
        files = hub.repositories.pop((repository.name, repository.revision))
        hub.repositories[f"me/{repository.folder}-mirror", "main"] = files
    return f"me/{PRIOR.folder}-mirror", f"me/{DECODER.folder}-mirror"


@pytest.fixture
def add(hub: Hub, tmp_path: Path) -> Callable[..., None]:
    """Add files to a repository of the Hub, by path."""

    def add(name: str, **files: Path | bytes) -> None:
        folder = tmp_path / "repositories" / name
        for path, content in files.items():
            file = folder / path.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        hub.repositories[name, "main"] = list_repository(folder)

    return add


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("base")
    write_download(folder / "published", sorted(NEEDED), SMALL)
    assert main(["--download", str(folder / "published"), "--output", str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    """A single file with a fine-tuned Stage C of the base's size."""
    tensors = load_file(base / "prior" / "diffusion_pytorch_model.safetensors")
    tensors["clf.1.bias"] = tensors["clf.1.bias"] + 1
    save_file(tensors, base.parent / "tuned.safetensors")
    return base.parent / "tuned.safetensors"


@pytest.fixture
def save(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Make a model folder from a downloaded repository, in this process. Returns its stderr."""

    def save(name: str, code: int = 0) -> str:
        folders = ["--download", tmp_path / "download", "--output", tmp_path / "model", "--base", base]
        assert main(["--repository", name, *map(str, folders)]) == code
        return capsys.readouterr().err.strip()

    return save


@pytest.fixture
def fetch(tmp_path: Path, succeed: Run) -> Callable[[str], str]:
    return lambda name: succeed("download-weights", "--output", tmp_path / "download", "--repository", name)


@pytest.fixture
def refuse(tmp_path: Path, fail: Run) -> Callable[[str], str]:
    return lambda name: fail("download-weights", "--output", tmp_path / "download", "--repository", name)


def test_mirrors_of_the_published(hub: Hub, mirrors: tuple[str, str], tmp_path: Path, succeed: Run) -> None:
    """One command makes the model; a second one finds the download."""
    download, output = tmp_path / "download", tmp_path / "model"
    named = [argument for name in mirrors for argument in ("--repository", name)]
    folders = ["--download", download, "--output", output, "--base", tmp_path / "nowhere"]
    succeed("save-weights", *named, *folders)
    opened = ModelFolder.open(output)
    opened.verify()
    assert set(opened.parts) >= NEEDED
    fetched = hub.fetched()
    assert len(set(fetched)) == len(fetched)
    assert all(path.endswith((".json", ".txt", ".safetensors")) for path in fetched)
    assert not any(
        "lite" in path or re.search(r"/diffusion_pytorch_model\.safetensors|stage_", path) for path in fetched
    )

    hub.seen.clear()
    assert main([*named, *map(str, folders), "--remove-download"]) == 0
    assert hub.seen == []
    assert not download.exists()


def test_a_fine_tuned_file(
    hub: Hub, add: Callable[..., None], tmp_path: Path, fetch: Run, save: Run, tuned: Path
) -> None:
    add("me/tuned", README_dot_md=b"mine", tuned_dot_safetensors=tuned)
    fetch("me/tuned")
    save("me/tuned")
    network = ModelFolder.open(tmp_path / "model").load_component("prior")
    assert (network.clf[1].bias == load_file(tuned)["clf.1.bias"].float()).all()
    assert hub.fetched() == ["me/tuned/tuned.safetensors"]


def test_a_branch_that_moves(hub: Hub, add: Callable[..., None], tmp_path: Path, fetch: Run, tuned: Path) -> None:
    """The new file has the same size as the old one."""
    add("me/tuned", tuned_dot_safetensors=tuned)
    fetch("me/tuned")
    hub.seen.clear()
    fetch("me/tuned")
    assert hub.fetched() == []
    add("me/tuned", tuned_dot_safetensors=tuned.read_bytes()[:-4] + b"1234")
    fetch("me/tuned")
    assert (tmp_path / "download" / "me--tuned" / "tuned.safetensors").read_bytes().endswith(b"1234")
    listed = json.loads((tmp_path / "download" / "download.json").read_text())
    assert listed["parts"] == []
    assert list(listed["repositories"]) == ["me/tuned"]


def test_several_files(hub: Hub, add: Callable[..., None], refuse: Run, fetch: Run, save: Run, tuned: Path) -> None:
    add("me/several", tuned_dot_safetensors=tuned, old_dot_safetensors=tuned, deep__prior__other_dot_safetensors=tuned)
    assert refuse("me/several") == (
        "me/several has several files of weights: say which, as me/several/old.safetensors. There are old.safetensors, "
        "tuned.safetensors."
    )
    assert refuse("me/several/face") == "me/several has no file or folder face."
    assert hub.fetched() == []
    for path in ("tuned.safetensors", "deep/prior"):
        fetch(f"me/several/{path}")
        save(f"me/several/{path}")
    assert hub.fetched() == ["me/several/tuned.safetensors", "me/several/deep/prior/other.safetensors"]


def test_what_cannot_be_used(hub: Hub, add: Callable[..., None], refuse: Run) -> None:
    add("me/pickles", model_dot_ckpt=b"PK", README_dot_md=b"mine")
    assert refuse("me/pickles") == "me/pickles has no weights of Stable Cascade in safetensors files."
    assert refuse("mine") == "'mine' is not the name of a repository: it must be like owner/name."
    assert refuse("me/nothing") == (
        f"{hub.url} has no repository me/nothing, or shows it only to those with a token, in HF_TOKEN."
    )


def test_a_file_that_was_damaged_since(
    add: Callable[..., None], tmp_path: Path, fetch: Run, save: Run, tuned: Path
) -> None:
    add("me/tuned", tuned_dot_safetensors=tuned)
    fetch("me/tuned")
    file = tmp_path / "download" / "me--tuned" / "tuned.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert save("me/tuned", 1) == f"{file} is damaged: delete it, and run scripts/download-weights again."
