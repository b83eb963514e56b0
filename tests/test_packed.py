"""Packed folders of reference data: nothing is lost, and changed tensors are stored."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import packed
from tests.packed import ARCHIVE, README, Draw, known_draws, pack, unpack

DRAWS = {
    "sub/one.safetensors": {
        "a": Draw(seed=3, skip=0, scale=0.2, mean=0.0),
        "b": Draw(seed=3, skip=48, scale=0.5, mean=1.0),
    },
    "gone.safetensors": {"a": Draw(seed=4, skip=0, scale=1.0, mean=0.0)},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with drawn tensors, "a" and "b", and others."""
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / README).write_text("what it is")
    (folder / "one.json").write_text("{}")
    drawn = torch.rand(48, generator=(generator := torch.Generator().manual_seed(3)))
    a = 0.2 * torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    b = 1 + 0.5 * torch.randn(16, generator=generator)
    others = {"c": drawn, "d": torch.arange(3), "e": torch.tensor(2.0), "f": torch.ones(5, dtype=torch.float16)}
    save_file({"a": a, "b": b, **others}, folder / "sub" / "one.safetensors", {"rank": "3"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_files_come_back(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "packed", DRAWS)
    assert sorted(contents(tmp_path / "packed")) == [README, ARCHIVE]
    assert known_draws(tmp_path / "packed") == {"sub/one.safetensors": DRAWS["sub/one.safetensors"]}
    unpack(tmp_path / "packed", tmp_path / "made")
    assert contents(tmp_path / "made") == contents(source)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_changed_number_is_kept(name: str, source: Path, tmp_path: Path) -> None:
    """Also one of a tensor that was drawn when the folder was packed before."""
    pack(source, tmp_path / "packed", DRAWS)
    file = source / "sub" / "one.safetensors"
    changed = load_file(file)
    changed[name].view(-1)[7] += 1e-6
    save_file(changed, file)
    pack(source, tmp_path / "packed", known_draws(tmp_path / "packed"))
    assert sorted(known_draws(tmp_path / "packed")["sub/one.safetensors"]) == sorted({"a", "b"} - {name})
    unpack(tmp_path / "packed", tmp_path / "made")
    assert contents(tmp_path / "made") == contents(source)


def test_an_outside_folder_is_read_where_it_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(source, tmp_path / "packed", DRAWS)
    monkeypatch.setenv("FIXTURES_OF_A_TEST", str(source))
    assert packed.folder("FIXTURES_OF_A_TEST", tmp_path / "packed") == source
    own = packed.folder("FIXTURES_THAT_NOBODY_SETS", tmp_path / "packed")
    assert own != source
    assert contents(own) == contents(source)


def test_the_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` runs it, in a module of its own."""
    for action, *paths in (("pack", source, tmp_path / "packed"), ("unpack", tmp_path / "packed", tmp_path / "made")):
        monkeypatch.setattr("sys.argv", ["packed", action, *map(str, paths)])
        runpy.run_path(packed.__file__, run_name="__main__")
    assert contents(tmp_path / "made") == contents(source)
