"""What `pip install` gives a user: the wheel, its names and their types."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import cascade
from scripts.environment import ROOT

TYPING = Path(__file__).parent / "typing"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
PROGRAM = """
import sys
import cascade
from cascade import Cascade, Request

print(cascade.__file__)
(image,) = Cascade.load(sys.argv[1], "cpu").generate(Request("a red apple", steps_prior=2, steps_decoder=1))
image.save("apple.png")
"""
needs_mini = pytest.mark.skipif(not (ROOT / "weights/mini/model.json").is_file(), reason="weights/mini is not there")


def python(*arguments: str | Path, folder: Path, installed: Path | None = None) -> str:
    """What a Python prints that runs in `folder`, and finds the package where it is installed."""
    done = run(*arguments, folder=folder, installed=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(*arguments: str | Path, folder: Path, installed: Path | None = None) -> subprocess.CompletedProcess[str]:
    # The other packages may be on the path, too.
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    others = [entry for entry in inherited if Path(entry).resolve() != ROOT]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(installed)] if installed else []), *others])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, as setuptools writes beside its sources. Needs no network."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("cascade", "scripts", "serving", "training"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "predict.py"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index", "--no-deps")
    python(*pip, "--no-build-isolation", "--wheel-dir", output, source, folder=source)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    python(*pip, "--target", target, wheel, folder=target)
    return target


@pytest.mark.slow
def test_the_wheel_holds_the_engine_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"{wheel.name.rsplit('-', 3)[0]}.dist-info"
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "cascade").rglob("*.py")}
    assert {name for name in names if not name.startswith(about)} == {*modules, "cascade/py.typed"}
    assert f"{about}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_version_is_said_once(installed: Path) -> None:
    (found,) = metadata.distributions(path=[str(installed)])
    assert found.version == cascade.__version__
    assert "version" not in PROJECT
    assert found.metadata["License-Expression"] == "Apache-2.0"


def test_it_needs_what_it_imports() -> None:
    distributions = metadata.packages_distributions()
    imported = {
        name.partition(".")[0]
        for path in (ROOT / "cascade").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # triton comes with torch, where there is one.
    others = imported - set(sys.stdlib_module_names) - {"cascade", "triton"}
    expected = {canonicalize_name(distributions[name][0]) for name in others}
    assert {canonicalize_name(one.name) for one in NEEDED} == expected


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda one: one.name)
def test_the_tests_run_with_what_it_allows(requirement: Requirement) -> None:
    assert requirement.specifier
    assert requirement.specifier.contains(metadata.version(requirement.name))


@pytest.mark.slow
@needs_mini
def test_installed_it_makes_a_picture_anywhere(installed: Path, tmp_path: Path) -> None:
    printed = python("-c", PROGRAM, ROOT / "weights" / "mini", folder=tmp_path, installed=installed)
    assert Path(printed.strip()) == installed / "cascade" / "__init__.py"
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (256, 256)


def test_all_names_are_there() -> None:
    assert {"Cascade", "Control", "Progress", "Request"} < set(cascade.__all__) <= set(dir(cascade))
    for name in cascade.__all__:
        assert getattr(cascade, name) is not None
    with pytest.raises(AttributeError, match="module 'cascade' has no attribute 'Kaskade'"):
        _ = cascade.Kaskade


@pytest.mark.slow
@pytest.mark.parametrize("module", ["cascade", "scripts.download_weights"])
def test_what_needs_no_networks_does_not_wait_for_torch(module: str) -> None:
    """torch and transformers take seconds to import; `scripts/download-weights --help` is not to."""
    program = f"import sys, {module}; print({{'torch', 'transformers', 'diffusers', 'numpy'}} & set(sys.modules))"
    assert python("-c", program, folder=ROOT) == "set()\n"


@pytest.mark.slow
def test_types_are_what_a_user_expects(installed: Path, tmp_path: Path) -> None:
    """A type checker finds what is wrong in a user's program, and nothing of the package's own."""
    shutil.copy(TYPING / "user.py", tmp_path)
    (tmp_path / "wrong.py").write_text(
        "import cascade\n\n"
        "cascade.Kaskade\n"
        "cascade.Request(7)\n"
        "cascade.Cascade.load('mini').batch(cascade.Request('a cat'))\n"
    )
    mypy = ("-m", "mypy", "--config-file", TYPING / "mypy.ini", "--cache-dir", tmp_path / "cache", "--no-error-summary")
    assert python(*mypy, "user.py", folder=tmp_path, installed=installed) == ""
    done = run(*mypy, "wrong.py", folder=tmp_path, installed=installed)
    places = [line.split(": error: ")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert places == ["wrong.py:3", "wrong.py:4", "wrong.py:5"], done.stdout + done.stderr
