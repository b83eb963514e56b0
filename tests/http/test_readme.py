"""The examples of README.md and docs/http.md that call the server, run as they stand there, but for the port."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.http.serving import ROOT, Server
from tests.readme import block

README = ROOT / "README.md"
HTTP = ROOT / "docs" / "http.md"


def run(command: list[str], code: str, server: Server, folder: Path) -> None:
    assert "http://localhost:5000" in code
    # The first python3 is that of the tests, which has requests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [*command, code.replace("http://localhost:5000", server.url)],
        cwd=folder,
        env={**os.environ, "PATH": path},
        check=True,
        timeout=600,
    )


def is_picture(file: Path, kind: str, size: tuple[int, int]) -> bool:
    with Image.open(file) as picture:
        picture.load()
        return (picture.format, picture.size) == (kind, size)


@pytest.mark.parametrize("page", [README, HTTP], ids=lambda page: page.name)
def test_curl(page: Path, server: Server, tmp_path: Path) -> None:
    run(["sh", "-c"], block(page, "sh", "curl"), server, tmp_path)
    assert is_picture(tmp_path / "apple.webp", "WEBP", (256, 256))


def test_python(server: Server, tmp_path: Path) -> None:
    run([sys.executable, "-c"], block(HTTP, "python", "requests"), server, tmp_path)
    first, second = sorted(tmp_path.glob("apple-*.png"))
    assert is_picture(first, "PNG", (256, 256))
    assert is_picture(second, "PNG", (256, 256))
    assert first.read_bytes() != second.read_bytes()


def test_javascript(server: Server, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None and "CI" not in os.environ:  # there it must run; a contributor needs Python only
        pytest.skip("node is not installed")
    assert node, "node is not installed"
    run([node, "--input-type=module", "--eval"], block(HTTP, "js", "fetch"), server, tmp_path)
    assert is_picture(tmp_path / "apple.webp", "WEBP", (312, 208))
