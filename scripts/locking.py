"""The command line of ``scripts/lock``: uv resolves the .in files into the .txt files."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.environment import OLDEST_PYTHON, ROOT

# Each requirements file, with those that are installed before it.
LAYERS: dict[str, tuple[str, ...]] = {
    "requirements": (),
    "training/requirements": ("requirements",),
    "bulk/requirements": ("requirements",),
    "studio/requirements": ("requirements",),
    "requirements-dev": ("requirements", "training/requirements", "bulk/requirements", "studio/requirements"),
}


def resolve(root: Path, name: str, locked: dict[str, list[str]], *options: str) -> list[str]:
    """The lines ``package==version`` of all packages that ``name``.in needs, on every platform.

    Args:
        root: the folder of the files.
        name: a key of `LAYERS`.
        locked: the lines of the layers below, whose versions are kept.
        options: of ``uv pip compile``.

    Raises:
        subprocess.CalledProcessError: no set of versions fits; uv has printed why.
    """
    below = [line for lower in LAYERS[name] for line in locked[lower]]
    before = root / f"{name}.txt"
    with tempfile.TemporaryDirectory() as folder:
        # uv prefers the versions in the existing output file.
        constraints, written = Path(folder, "below.txt"), Path(folder, "written.txt")
        constraints.write_text("\n".join(below))
        own = before.read_text().splitlines() if before.is_file() else []
        written.write_text("\n".join([*below, *(line for line in own if "==" in line)]))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", f"{name}.in"]
        command += ["--python-version", ".".join(map(str, OLDEST_PYTHON)), "--constraint", constraints]
        command += ["--no-header", "--no-annotate", "--output-file", written, *options]
        subprocess.run(command, cwd=root, check=True, stdout=sys.stderr)
        return [line for line in written.read_text().splitlines() if line not in below]


def lock(root: Path, *options: str) -> dict[str, str]:
    """The content of each .txt file, by its name without the ending. Writes nothing."""
    locked: dict[str, list[str]] = {}
    for name in LAYERS:
        locked[name] = resolve(root, name, locked, *options)
    # Only the development file includes others: scripts that need training's packages install the runtime's first.
    includes = {"requirements-dev": [f"-r {lower}.txt" for lower in LAYERS["requirements-dev"]]}
    return {
        name: "\n".join([f"# Written by scripts/lock: change {name}.in instead.", *includes.get(name, []), *lines, ""])
        for name, lines in locked.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the .txt files; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/lock", description="Lock the versions of all packages.")
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions that fit, not the locked ones")
    options = parser.parse_args(arguments)
    try:
        files = lock(ROOT, *(["--upgrade"] if options.upgrade else []))
    except subprocess.CalledProcessError as error:
        return error.returncode
    for name, content in files.items():
        (ROOT / f"{name}.txt").write_text(content)
    return 0
