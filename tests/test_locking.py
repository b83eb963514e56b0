"""What is installed is what the lock says, and the lock has what was asked for."""

from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.environment import ROOT
from scripts.locking import LAYERS


def requirements(file: str) -> list[Requirement]:
    lines = (ROOT / file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]


@pytest.mark.parametrize("name", LAYERS)
def test_the_lock_has_what_is_asked_for(name: str) -> None:
    locked = {(canonicalize_name(one.name), one.specifier) for layer in LAYERS for one in requirements(f"{layer}.txt")}
    assert {(canonicalize_name(one.name), one.specifier) for one in requirements(f"{name}.in")} <= locked


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_installed_is_what_is_locked(name: str) -> None:
    here = [one for one in requirements(f"{name}.txt") if one.marker is None or one.marker.evaluate()]
    assert len(here) >= len(requirements(f"{name}.in"))
    # Without the part behind a plus, which says for which CUDA a torch was built.
    found = {one.name: metadata.version(one.name).partition("+")[0] for one in here}
    assert found == {one.name: str(one.specifier).removeprefix("==") for one in here}


def needs() -> list[tuple[str, Requirement]]:
    """What each locked package needs here, with its name."""
    locked = {canonicalize_name(one.name) for layer in LAYERS for one in requirements(f"{layer}.txt")}
    return [
        (name, one)
        for name in sorted(locked)
        for text in (metadata.requires(name) if is_installed(name) else None) or []
        if (one := Requirement(text)) and (one.marker is None or one.marker.evaluate({"extra": ""}))
    ]


def test_nothing_is_installed_that_is_not_locked() -> None:
    locked = {canonicalize_name(one.name) for layer in LAYERS for one in requirements(f"{layer}.txt")}
    assert {canonicalize_name(one.name) for _, one in needs()} - locked - {"setuptools"} == set()


def test_no_package_refuses_what_is_locked() -> None:
    """So that pip installs the files as they are."""
    locked = {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for layer in LAYERS
        for one in requirements(f"{layer}.txt")
        if one.marker is None or one.marker.evaluate()
    }
    refused = [
        f"{name} needs {one}"
        for name, one in needs()
        if (version := locked.get(canonicalize_name(one.name)))
        and not one.specifier.contains(version, prereleases=True)
    ]
    assert refused == []


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
