"""The scripts' virtual environment: ``.venv`` in the repository, made on first use. Needs only Python.

A script begins with ``environment.enter("requirements.txt")``. If this Python has the file's packages, as in a
container or in an up-to-date ``.venv``, it returns at once. Otherwise it makes or updates the environment, and restarts
the script inside it. Scripts that start at the same time wait for one another.
"""

import ast
import atexit
import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
OLDEST_PYTHON = (3, 11)
PIP = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
# Settings of pip that say where packages come from, and uv's. Those of indexes are variables, because they can hold passwords.
VARIABLES = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_EXTRA_INDEX_URL", "cert": "SSL_CERT_FILE"}
OPTIONS = {"find-links": "--find-links", "trusted-host": "--allow-insecure-host", "constraint": "--constraints"}
# Modules that are compiled when they are imported, if ever: half of all, 24 of 49 s on two cores.
SELDOM = (
    r"/(tests?|testing|_vendor|fontTools|mypyc?)/|/diffusers/(models|(modular_)?pipelines)/|/pygments/lexers/|"
    r"/ray/(llm|rllib|serve|train|tune)/|/sympy/(physics|stats)/|/transformers/models/"
)


def enter(requirements: str) -> None:
    """Continue in an environment with the packages of a requirements file, a path relative to the repository's root.

    In ``sys.path``, the repository's root replaces the folder of the scripts.
    """
    if sys.version_info < OLDEST_PYTHON:
        needed, found = (".".join(map(str, version[:2])) for version in (OLDEST_PYTHON, sys.version_info))
        sys.exit(f"Python {needed} or newer is needed; this is {found}. Run: python{needed} {sys.argv[0]}")
    here = has_packages(requirements)
    if not here and not is_installed(requirements):
        with open_lock(requirements) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_installed(requirements):
                install(requirements)
    # Spinning threads starve each other when another process keeps a core busy: on two cores, a miniature's picture took
    # 27 to 52 s, and takes 2 s with passive waiting. The OpenMP library reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not here and Path(sys.prefix).resolve() != VENV.resolve():
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    sys.path[0] = str(ROOT)
    # Python ends by looking for garbage in everything that was imported: up to 1.3 s.
    atexit.register(gc.freeze)


def open_lock(requirements: str) -> TextIO:
    """The lock file of installations. Ends the process if this user may not write into the repository."""
    try:
        return (ROOT / ".venv.lock").open("w")
    except OSError as error:
        sys.exit(
            f"{VENV} has no packages of {requirements} that this user can run, and cannot be made: {error.strerror}. "
            f"Run {sys.argv[0]} once as the owner of {ROOT}, with a Python that all users can run, or copy the folder."
        )


def with_included(requirements: str) -> list[str]:
    """A requirements file and those that it includes."""
    lines = (ROOT / requirements).read_text(encoding="utf-8").splitlines()
    included = [line.split(maxsplit=1)[1] for line in lines if line.startswith("-r ")]
    return [requirements, *(name for file in included for name in with_included(file))]


def lines_of(requirements: str) -> list[str]:
    """The lines of a requirements file and of those that it includes."""
    return [line for name in with_included(requirements) for line in (ROOT / name).read_text("utf-8").splitlines()]


def has_packages(requirements: str) -> bool:
    """Whether this Python has the packages of a requirements file, in the versions that it names.

    Packages with a condition (on the platform or the version of Python) are not checked.
    """
    for line in lines_of(requirements):
        requirement = line.partition("#")[0].strip()
        if not requirement or requirement.startswith("-r ") or ";" in requirement:
            continue
        name, pinned, version = requirement.partition("==")
        try:
            if not pinned or metadata.version(name).partition("+")[0] != version:
                return False
        except metadata.PackageNotFoundError:
            return False
    return True


def stamp(requirements: str) -> tuple[Path, str]:
    """The file that marks a requirements file as installed, and its content: a digest of that file and its includes."""
    content = b"\0".join((ROOT / name).read_bytes() for name in with_included(requirements))
    return VENV / f"{requirements.replace('/', '-')}.installed", hashlib.sha256(content).hexdigest()


def is_installed(requirements: str) -> bool:
    """Whether ``.venv`` is up to date, and this user can run it. Its Python may be in another user's home."""
    file, digest = stamp(requirements)
    return os.access(PYTHON, os.X_OK) and os.access(file, os.R_OK) and file.read_text() == digest


def pip_settings() -> dict[str, str]:
    """pip's settings from its files and from variables, which count more."""
    listed = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in ("global", "install", ":env:"):
            settings[option] = ast.literal_eval(value)
    return settings


def install_by_uv(requirements: str) -> bool:
    """Installs by uv, from where pip would: all packages in 20 s instead of 150, on two cores. Returns whether it has.

    Args:
        requirements: a path relative to the repository's root.
    """
    uv = shutil.which("uv")
    if uv is None:
        (pinned,) = (line for line in lines_of("requirements-dev.txt") if line.startswith("uv=="))
        subprocess.run([*PIP, "--quiet", pinned], check=True, capture_output=True)
        uv = str(PYTHON.with_name("uv"))
    settings = pip_settings()
    command = [uv, "pip", "install", "--python", PYTHON, "-r", ROOT / requirements]
    command += ["--index-strategy", "unsafe-best-match"]  # as pip: a version from whichever index has it
    for name, option in OPTIONS.items():
        command += [part for value in settings.get(name, "").split() for part in (option, value)]
    if settings.get("no-index", "").lower() in ("1", "on", "true", "yes"):
        command.append("--no-index")
    variables = {VARIABLES[name]: " ".join(settings[name].split()) for name in VARIABLES if name in settings}
    return subprocess.run(command, stdout=sys.stderr, env={**variables, **os.environ}).returncode == 0


def install(requirements: str) -> None:
    """Make ``.venv`` unless it works, and install into it. Prints to stderr, because stdout is the script's."""
    sys.stderr.write(f"Installing {requirements} into {VENV}; this takes some minutes the first time.\n")
    try:
        if (
            not os.access(PYTHON, os.X_OK)
            or subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode != 0
        ):
            subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True, stdout=sys.stderr)
        try:
            done = install_by_uv(requirements)
        except (OSError, ValueError, subprocess.CalledProcessError):  # no wheel of uv, or no file that names one
            done = False
        if not done:
            subprocess.run([*PIP, "-r", ROOT / requirements], check=True, stdout=sys.stderr)
        # pip would compile all modules on one core, which takes 40 s. Some are templates, which are no Python.
        compileall = [PYTHON, "-m", "compileall", "-qq", "-j", "0", "-x", SELDOM]
        subprocess.run([*compileall, VENV / "lib"], stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        sys.exit(f"Installing {requirements} failed; the messages above say why. {error}")
    for name in with_included(requirements):
        file, digest = stamp(name)
        file.write_text(digest)
