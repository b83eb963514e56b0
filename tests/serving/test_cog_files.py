"""What stands in the place of Cog's own download; tests/http/test_image_urls.py has the rest, through Cog's server."""

from pathlib import Path

import cog
import pytest

from predict import Predictor
from serving import cog_files


def test_the_version_that_this_was_read_in() -> None:
    """With another: read again who downloads, when `run`'s annotations are read, and which folders are made."""
    assert cog.__version__ == "0.23.1"


def test_inputs_that_take_files_are_said_to_take_text() -> None:
    run = cog_files.takes_urls(Predictor().run)
    kinds = Predictor.run.__annotations__
    texts = {name for name, kind in run.__annotations__.items() if kind != kinds[name]}
    assert texts == {"image", "mask", "image_prompts", "control_images", "ip_adapter_images", "ip_adapter_masks"}
    assert {run.__annotations__[name] for name in texts} == {str}


def test_only_empty_and_old_folders_of_cog_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cog_files, "COG_FOLDERS", tmp_path)
    for name in ("empty", "full"):
        for part in ("inputs", "outputs"):
            (tmp_path / name / part).mkdir(parents=True)
    (tmp_path / "full" / "outputs" / "file").touch()
    cog_files.sweep()
    assert (tmp_path / "empty" / "inputs").exists()
    monkeypatch.setattr(cog_files, "SWEEP_AFTER", -1)
    cog_files.sweep()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "outputs" / "file").exists()
