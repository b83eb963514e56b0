"""What scripts/serve does before the server runs; tests/http has the rest."""

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scripts import server
from scripts.openapi import add_training, make_schema
from scripts.signatures import SchemaError
from tests.http.serving import free_port

SOURCE = "class Predictor:\n    def run(self, x: int = {}) -> str: ...\n"

TRAINER = """
class Output(BaseModel):
    weights: Path

def train(steps: int = Input(description="Steps.", default=3, ge=1)) -> Output:
    pass
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of a predictor and a cog.yaml."""
    monkeypatch.setattr(server, "ROOT", tmp_path)
    monkeypatch.setattr(server, "SCHEMA", tmp_path / ".cog" / "openapi_schema.json")
    (tmp_path / "predict.py").write_text(SOURCE.format(1))
    (tmp_path / "cog.yaml").write_text(
        "environment:\n  - A=b=c\n  - D=\nrun: predict.py:Predictor\ntrain: train.py:train\n"
    )
    (tmp_path / "train.py").write_text(TRAINER)
    return tmp_path


def schema(source: str) -> dict[str, Any]:
    """The whole document of a predictor, and of `TRAINER`."""
    document = make_schema(source)
    add_training(document, TRAINER)
    return document


def test_cog_yaml_says_what_is_run_and_in_which_environment(root: Path) -> None:
    assert server.read_config() == ("predict.py:Predictor", "train.py:train", {"A": "b=c", "D": ""})


def test_the_schema_follows_the_predictor(root: Path) -> None:
    for default in (1, 2):
        source = SOURCE.format(default)
        (root / "predict.py").write_text(source)
        assert server.write_schema("predict.py:Predictor", "train.py:train") == root
        (written,) = (root / ".cog").iterdir()
        assert json.loads(written.read_text()) == schema(source)


def test_a_schema_that_is_right_is_not_written(root: Path) -> None:
    """It may lie where this user cannot write."""
    server.write_schema("predict.py:Predictor", "train.py:train")
    before = server.SCHEMA.stat()
    server.write_schema("predict.py:Predictor", "train.py:train")
    assert server.SCHEMA.stat() == before


def test_where_the_schema_cannot_be_written_a_temporary_folder_has_it(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    (root / ".cog").touch()  # no folder: nobody, not even root, can write into it
    folder = server.write_schema("predict.py:Predictor", "train.py:train")
    assert folder.parent == Path(tempfile.gettempdir())
    written = json.loads((folder / ".cog" / "openapi_schema.json").read_text())
    assert written == schema((root / "predict.py").read_text())


def test_a_predictor_that_cannot_be_read_leaves_the_schema_alone(root: Path) -> None:
    server.write_schema("predict.py:Predictor", "train.py:train")
    before = server.SCHEMA.read_bytes()
    (root / "predict.py").write_text(SOURCE.format("None"))
    with pytest.raises(SchemaError, match="x has the default None"):
        server.write_schema("predict.py:Predictor", "train.py:train")
    assert [(file.name, file.read_bytes()) for file in (root / ".cog").iterdir()] == [(server.SCHEMA.name, before)]


def test_a_predictor_that_cannot_be_read_is_not_served(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "predict.py").write_text(SOURCE.format("None"))
    assert server.main(["--port", str(free_port())]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "predict.py:Predictor or train.py:train has inputs that Cog cannot describe. Line 2: x has the default None"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "::", "0.0.0.0"])
def test_hosts_by_name_and_of_ipv6(host: str) -> None:
    port = free_port()
    try:
        sockets = server.bind(host, port)
    except OSError as error:
        if ":" in host and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            pytest.skip("this machine has no IPv6")
        raise
    assert {one.getsockname()[1] for one in sockets} == {port}
    assert host not in ("127.0.0.1", "::1", "::", "0.0.0.0") or [one.getsockname()[0] for one in sockets] == [host]
    for one in sockets:
        one.close()


def test_all_users_may_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, and at once: Cog's folder is the same for all."""
    monkeypatch.setattr(server, "COG_FOLDERS", tmp_path / "coglet" / "predictions")
    for _ in range(2):
        server.share_cog_folders()
        assert server.COG_FOLDERS.stat().st_mode & 0o7777 == 0o1777


def test_without_the_folder_for_predictions_nothing_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()  # no folder: nobody, not even root, can write into it
    monkeypatch.setattr(server, "COG_FOLDERS", tmp_path / "file" / "predictions")
    assert server.main(["--port", str(free_port())]) == 1
    assert capsys.readouterr().err == (
        f"Cog keeps predictions in {tmp_path}/file/predictions, which this user cannot write: Not a directory. Its owner "
        "must remove it.\n"
    )
