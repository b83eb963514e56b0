"""docs/architecture.md is true: its tree, and the way imports go."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.readme import ROOT

PAGE = ROOT / "docs" / "architecture.md"
# What code in a room may import of ours, besides the room itself. The longest name that fits a module decides.
ALLOWED = {
    "scripts": ("studio", "predict", "bulk", "serving", "cascade", "training", "miniature"),
    "studio": ("predict", "serving", "cascade"),
    "predict": ("serving", "cascade"),
    "train": ("training", "serving", "cascade"),
    "bulk": ("serving", "cascade"),
    "serving": ("cascade",),
    "training": ("cascade",),
    "miniature": ("training", "cascade"),
    "cascade": ("cascade",),
    "cascade.compat": ("cascade",),
    "cascade.loading": ("cascade.weights", "cascade.running", "cascade.kernels"),
    "cascade.guides": (
        "cascade.stages",
        "cascade.running",
        "cascade.images",
        "cascade.networks",
        "cascade.limits",
        "cascade.sizes",
    ),
    "cascade.loras": ("cascade.weights", "cascade.running", "cascade.networks", "cascade.limits"),
    "cascade.loras.lora": ("cascade.limits",),
    "cascade.loras.words": (),
    "cascade.request": (
        "cascade.guides",
        "cascade.loras.lora",
        "cascade.prompts",
        "cascade.limits",
        "cascade.sampling",
        "cascade.sizes",
    ),
    "cascade.stages": ("cascade.prompts", "cascade.networks", "cascade.sampling", "cascade.sizes"),
    "cascade.running": ("cascade.networks", "cascade.kernels"),
    "cascade.weights": (
        "cascade.prompts",
        "cascade.images",
        "cascade.networks",
        "cascade.sampling",
        "cascade.sizes",
        "cascade.safety",
    ),
    "cascade.safety": ("cascade.weights",),
    "cascade.images": (),
    "cascade.limits": ("cascade.networks", "cascade.sizes"),
    "cascade.progress": (),
    "cascade.networks": ("cascade.kernels",),
    "cascade.kernels": (),
    "cascade.sampling": (),
    "cascade.sizes": (),
    "cascade.prompts": ("cascade.networks", "cascade.limits"),
}


def tree() -> Iterator[str]:
    """The paths that the tree names, relative to the repository's root."""
    text = re.search(r"^## The tree\n+```\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)[1]
    folder = ""
    for line in text.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            yield folder + name
        else:
            folder = name
            yield name


def modules() -> dict[str, Path]:
    rooms = {one.partition(".")[0] for one in ALLOWED} - {"predict", "train"}
    files = [ROOT / "predict.py", ROOT / "train.py", *(file for one in rooms for file in (ROOT / one).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(names, files, strict=True))


MODULES = modules()


@functools.cache
def imported(name: str) -> set[str]:
    """Our modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found & set(MODULES) - {name}


def room(name: str) -> str:
    return max((one for one in ALLOWED if f"{name}.".startswith(f"{one}.")), key=len)


def test_the_tree_is_there() -> None:
    named = set(tree())
    assert [path for path in named if not (ROOT / path).exists()] == []
    files = {f"cascade/{file.name}" for file in (ROOT / "cascade").glob("*.py")} - {"cascade/__init__.py"}
    rooms = {f"cascade/{file.parent.name}/" for file in (ROOT / "cascade").glob("*/__init__.py")}
    packages = {f"{file.parent.name}/" for file in ROOT.glob("*/__init__.py")}
    assert (files | rooms | packages) - named == set()


def test_paths_in_the_text_are_there() -> None:
    """Those in the engine may be named from its folder."""
    paths = re.findall(r"`([\w/]+/[\w.]*|[\w/]+\.py)`", PAGE.read_text("utf-8"))
    assert [path for path in paths if not any((ROOT / top / path).exists() for top in ("", "cascade"))] == []


def test_imports_go_one_way() -> None:
    wrong = []
    for name in sorted(MODULES):
        allowed = (room(name), *ALLOWED[room(name)])
        wrong += [(name, one) for one in imported(name) if not any(f"{one}.".startswith(f"{way}.") for way in allowed)]
    assert wrong == []


def test_there_is_no_circle() -> None:
    left = {name: imported(name) for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_networks_on_the_meta_device_are_made_without_values() -> None:
    """Else torch imports its compiler, in a second of a processor, see `networks.base.without_values`."""
    blocks = [
        (name, [ast.unparse(item.context_expr) for item in node.items])
        for name in MODULES
        if name.startswith(("cascade.", "serving."))
        if "torch.device(" in (text := MODULES[name].read_text("utf-8"))
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.With)
    ]
    devices = [(name, items) for name, items in blocks if any(item.startswith("torch.device(") for item in items)]
    assert devices
    assert [name for name, items in devices if not {"without_values()", "empty"} & set(items)] == []
