"""A Hub with stand-ins for the published repositories, and the real scripts, pointed at it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade.weights.published import DECODER, PRIOR, SAFETY
from tests.hub.repositories import write_repositories
from tests.hub.serving import Hub, StoredFile, list_repository

ROOT = Path(__file__).parent.parent.parent

Script = Callable[..., subprocess.Popen[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nearly all of them run scripts, each in a process of its own."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, StoredFile]]:
    """The Hub's repositories. Tests must not change them."""
    root = tmp_path_factory.mktemp("published")
    write_repositories(root)
    return {(one.name, one.revision): list_repository(root / one.name) for one in (PRIOR, DECODER, SAFETY)}


@pytest.fixture
def hub(published: dict[tuple[str, str], dict[str, StoredFile]]) -> Iterator[Hub]:
    with Hub({key: dict(files) for key, files in published.items()}) as hub:
        yield hub


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Iterator[Script]:
    """Start a script with arguments. Keyword arguments are environment variables."""
    started = []

    def start(script: str, *arguments: str | Path, **variables: Any) -> subprocess.Popen[str]:
        options = {name: variables.pop(name) for name in ("preexec_fn", "stdin", "stderr") if name in variables}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        started.append(
            subprocess.Popen(
                [sys.executable, ROOT / "scripts" / script, *map(str, arguments)],
                stdout=subprocess.PIPE,
                text=True,
                env={**inherited, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **variables},
                **{"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def succeed(start: Script) -> Callable[..., str]:
    """Run a script that must succeed, and return its stderr."""

    def succeed(script: str, *arguments: str | Path, **variables: Any) -> str:
        process = start(script, *arguments, **variables)
        _, err = process.communicate()
        assert process.returncode == 0, err
        return err

    return succeed


@pytest.fixture
def fail(start: Script) -> Callable[..., str]:
    """Run a script that must fail with one sentence on stderr, and return the sentence."""

    def fail(script: str, *arguments: str | Path, **variables: Any) -> str:
        process = start(script, *arguments, **variables)
        out, err = process.communicate()
        assert (process.returncode, out) == (1, ""), err
        assert "Traceback" not in err
        return err.splitlines()[-1]

    return fail
