"""README.md and docs are true: their table of inputs, commands, code, links and pictures."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

from cascade import Cascade, Request
from miniature.scenes import COLOUR_NAMES, HeldOut
from scripts import command_line, method_pictures, reconstruction
from scripts.input_table import with_table
from tests.readme import PAGES, ROOT, block, blocks, commands

README = ROOT / "README.md"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
MINI = ROOT / "weights" / "mini"
CARDS = (MINI / "README.md", ROOT / "tests" / "fixtures" / "README.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")

needs_mini = pytest.mark.skipif(not (MINI / "model.json").is_file(), reason="weights/mini is not there")


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def named_scripts() -> dict[str, set[str]]:
    """The scripts of this repository that any page names as code, with the options that it gives them."""
    found: dict[str, set[str]] = defaultdict(set)
    for page in PAGES:
        quoted = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for line in (*commands(page), *quoted):
            line = line.removeprefix("cog exec ")
            if line.startswith("scripts/") and not line.endswith(".py"):
                found[line.split()[0]] |= set(re.findall(r"(?<= )--?[a-z][a-z-]*", line))
    return found


def test_the_table_of_inputs_is_that_of_the_schema() -> None:
    text = (DOCS / "inputs.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run: .venv/bin/python -m scripts.input_table"


@pytest.mark.slow
@needs_mini
def test_the_first_command_makes_the_picture(tmp_path: Path) -> None:
    """As it is run in the repository's root, but its files are left in another folder."""
    for name in ("scripts", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = {name: value for name, value in os.environ.items() if name != "CASCADE_WEIGHTS"}
    variables |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", "-c", commands(README)[0]]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "apple.png") as picture:
        assert picture.size == (256, 256)


@pytest.mark.slow
@needs_mini
@pytest.mark.parametrize(
    ("page", "word", "pictures"), [(README, "model.generate", 2), (DOCS / "method.md", "model.batch", 3)]
)
def test_the_code_makes_the_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_mini: Path, page: Path, word: str, pictures: int
) -> None:
    (tmp_path / "weights").symlink_to(quick_mini.parent)
    monkeypatch.chdir(tmp_path)
    exec(block(page, "python", word), {})
    assert len(list(tmp_path.glob("*.png"))) == pictures
    for index in range(pictures):
        with Image.open(tmp_path / f"apple-{index}.png") as picture:
            assert picture.size == (256, 256)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_pages_import_is_there(page: Path) -> None:
    """Modules and names of the code in pages, and dotted names in their text."""
    text, code = page.read_text(encoding="utf-8"), "\n".join(blocks(page, "python"))
    assert not re.search(r"^cascade = ", code, re.MULTILINE), "hides the package, whose modules the text names"
    imported = re.findall(r"^from (cascade[\w.]*) import (.+)$", code, re.MULTILINE)
    quoted = re.findall(r"`(\w+)`, from `(cascade[\w.]*)`", text)
    dotted = re.findall(r"`cascade((?:\.\w+)+)\b[^`]*`", text)
    names = [(module, name.strip()) for module, listed in imported for name in listed.split(",")]
    names += [(module, name) for name, module in quoted]
    names += [(f"cascade{rest.rpartition('.')[0]}", rest.rpartition(".")[2]) for rest in dotted]
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.fixture(scope="module")
def drawn(quick_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures that the commands of docs/images.md are given."""
    folder = tmp_path_factory.mktemp("pictures")
    model = Cascade.load(quick_mini, "cpu")
    prompts = {
        "apple": "a red apple on a green background",
        "butterfly": "a butterfly above a sunflower on a light blue background",
        "strawberry": "a strawberry on a turquoise background",
    }
    for name, prompt in prompts.items():
        model.generate(Request(prompt))[0].save(folder / f"{name}.png")
    Image.open(folder / "apple.png").crop((0, 0, 256, 128)).save(folder / "half.png")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (60, 0, 200, 120))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture
def pictures(drawn: Path, quick_mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with those pictures and the miniature."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    (tmp_path / "weights").symlink_to(quick_mini.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASCADE_WEIGHTS", str(quick_mini))
    return tmp_path


MAINS = {"scripts/predict": command_line.main, "scripts/reconstruct": reconstruction.main}
IMAGE_COMMANDS = sorted(
    {line for name in ("images.md", "method.md") for line in commands(DOCS / name) if line.split()[0] in MAINS}
)


@pytest.mark.slow
@needs_mini
def test_the_commands_with_images(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the one that needs a ControlNet which the miniature does not have."""
    assert len(IMAGE_COMMANDS) == 7
    for line in IMAGE_COMMANDS:
        script, *arguments = shlex.split(line)
        status = MAINS[script](arguments)
        if "upscale=true" in line:
            assert (status, "controlnet_super_resolution" in capsys.readouterr().err) == (1, True)
            continue
        assert status == 0, capsys.readouterr().err
        with Image.open(pictures / arguments[arguments.index("-o") + 1]) as picture:
            assert picture.size == (256, 256)


@pytest.mark.slow
@needs_mini
def test_the_code_with_images(pictures: Path) -> None:
    exec(block(DOCS / "images.md", "python", "Control"), {})
    for name, size in {"lemon": (256, 256), "whole": (256, 384), "again": (256, 256)}.items():
        with Image.open(pictures / f"{name}.png") as picture:
            assert picture.size == size


@pytest.mark.slow
@needs_mini
def test_the_code_stage_by_stage(pictures: Path) -> None:
    """Both ways through the stages make one picture, but for the rounding of the prompts' batch."""
    for code in blocks(DOCS / "method.md", "python"):
        exec(code, {})
    with Image.open("apple.png") as steps, Image.open("stages.png") as stages:
        assert steps.size == (256, 256)
        assert np.asarray(ImageChops.difference(steps, stages)).mean() < 1
    with Image.open("preview.jpg") as preview:
        assert preview.size == (48, 48)


def test_scripts_are_there() -> None:
    assert named_scripts()
    for script in named_scripts():
        assert os.access(ROOT / script, os.X_OK), script


# Those of scripts/test are pytest's.
WITH_OPTIONS = sorted({name for name, options in named_scripts().items() if options} - {"scripts/test"})
# Each in a fork, so that only the first waits for imports, and frozen, so that none collects what it did not make.
HELP = """
import gc, os, runpy, sys
import bulk.run, miniature.evaluate, scripts.command_line, training.lora.run
gc.freeze()
folder, *names = sys.argv[1:]
for name in names:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.path.join(folder, os.path.basename(name)), os.O_WRONLY | os.O_CREAT), 1)
        sys.argv, sys.path[0] = [name, "--help"], os.path.dirname(os.path.abspath(name))
        code = 0
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        sys.stdout.flush()
        os._exit(code)  # at once, without taking all imported modules apart
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} --help failed")
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each script answers to ``--help``, by its name."""
    folder = tmp_path_factory.mktemp("help")
    command = [sys.executable, "-c", HELP, str(folder), *WITH_OPTIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_scripts_have_the_options_that_are_named(helps: Path, script: str) -> None:
    said = (helps / Path(script).name).read_text()
    assert said.startswith(f"usage: {script} ")
    assert not {option for option in named_scripts()[script] if not re.search(rf"{option}\b", said)}


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_pictures_are_small_and_shown() -> None:
    shown = {link for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8")) if link.endswith("webp")}
    files = list(IMAGES.iterdir())
    # The benchmark's plot needs a GPU, the page a browser; the others are drawn by scripts/make-method-pictures.
    expected = {*method_pictures.drawings(), "benchmark.webp", "studio.webp"}
    assert {file.name for file in files} == {Path(link).name for link in shown} == expected
    assert sum(file.stat().st_size for file in files) < 500_000


@needs_mini
@pytest.mark.parametrize(
    ("page", "size"),
    [
        (README, r"a complete Cascade of (\d+) MB"),
        (README, r"(\d+) MB for the miniature"),
        (DOCS / "weights.md", r"\| miniature \|.* (\d+) MB \|"),
        (ROOT / "CHANGELOG.md", r"A miniature of the whole model, (\d+) MB"),
    ],
)
def test_the_miniatures_size_is_that_of_its_folder(page: Path, size: str) -> None:
    (said,) = re.findall(size, page.read_text(encoding="utf-8"))
    assert int(said) == round(sum(file.stat().st_size for file in MINI.rglob("*") if file.is_file()) / 1e6)


def test_pictures_of_the_pages_share_a_limit() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    pictures = {"a": Image.fromarray(noise), "b": Image.fromarray(noise[:32])}
    best = method_pictures.compressed(pictures, 10**6)
    most = sum(map(len, best.values()))
    smaller = method_pictures.compressed(pictures, most - 1)
    assert all(len(smaller[name]) < len(best[name]) for name in pictures)
    assert sum(map(len, method_pictures.compressed(pictures, 0).values())) < most


def test_what_training_never_showed() -> None:
    names = [entry["name"] for entry in json.loads((ROOT / "miniature" / "objects.json").read_text())]
    held_out = HeldOut.of(names)
    for name, colour in (("red apple", "green"), ("parrot", "dark green")):
        assert held_out.colours[names.index(name), COLOUR_NAMES.index(colour)]
    for first, second in (("rocket", "full moon"), ("penguin", "umbrella")):
        assert held_out.pairs[names.index(first), names.index(second)]


@pytest.mark.slow
@needs_mini
def test_pictures_are_what_the_weights_make() -> None:
    """Whoever trains anew draws them anew. Colours change by some 3 of 255 through WebP's half as many colour samples."""
    drawn = method_pictures.draw_prior(Cascade.load(MINI, "cpu"))
    with Image.open(IMAGES / "prior.webp") as kept:
        assert kept.size == drawn.size
        difference = np.abs(np.asarray(kept.convert("RGB"), np.float32) - np.asarray(drawn, np.float32))
    assert difference.mean() < 5, "run: scripts/make-method-pictures"
