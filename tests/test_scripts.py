"""The environment that scripts make for themselves, with real virtual environments, and the command line of predict."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from cog import BaseRunner, Input
from cog import Path as CogPath
from PIL import Image

from scripts import environment
from scripts.command_line import InputError, list_inputs, main, read_inputs, save
from tests.metadata import read_record

SYSTEM_PYTHON = Path(sys.base_prefix) / "bin" / "python3"
SCRIPT = """\
import environment
environment.enter("requirements.txt")
import os, sys
import beside
import tiny
print(tiny.VERSION, beside.NAME, os.environ["OMP_WAIT_POLICY"], *sys.argv[1:])
"""


class Example(BaseRunner):
    """One input of every kind."""

    def run(
        self,
        prompt: str = Input(description="What to draw.", default=""),
        title: str = Input(description="A title."),
        count: int = Input(description="How many.", default=2, ge=1, le=4),
        scale: float = Input(description="How much.", default=1.5, ge=0),
        size: int | None = Input(description="How large.", default=None, le=64),
        fast: bool = Input(description="A switch.", default=False),
        shape: str = Input(description="A shape.", default="round", choices=["round", "square"]),
        image: CogPath | None = Input(description="A picture.", default=None),
        images: list[CogPath] | None = Input(description="Pictures.", default=None),
    ) -> list[CogPath]:
        return []


def make_wheel(folder: Path, version: str) -> Path:
    """A package of one module, as pip would download it."""
    wheel = folder / f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", f"tiny.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return wheel


def start(root: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SYSTEM_PYTHON, "scripts/hello", "a", "b c"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", **variables},
    )


def test_environment(tmp_path: Path) -> None:
    """From nothing, by two scripts at once; again; with a changed requirement; with one that fails; after damage."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(environment.__file__, tmp_path / "scripts")
    (tmp_path / "scripts" / "hello").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'root'\n")
    requirements = tmp_path / "requirements.txt"
    included = tmp_path / "more.txt"
    requirements.write_text("-r more.txt\n")
    included.write_text(f"{make_wheel(tmp_path, '1.0')}\n")

    both = [start(tmp_path) for _ in range(2)]
    results = [script.communicate() for script in both]
    assert [out for out, _ in results] == ["1.0 root PASSIVE a b c\n"] * 2, results
    assert "".join(err for _, err in results).count("Installing requirements.txt") == 1

    again = start(tmp_path)
    assert again.communicate() == ("1.0 root PASSIVE a b c\n", "")

    included.write_text(f"{make_wheel(tmp_path, '2.0')}\n")
    changed = start(tmp_path)
    assert changed.communicate()[0] == "2.0 root PASSIVE a b c\n"

    included.write_text("no-such-package==1.0\n")
    failed = start(tmp_path)
    out, err = failed.communicate()
    assert (out, failed.returncode) == ("", 1)
    assert err.splitlines()[-1].startswith("Installing requirements.txt failed")
    assert "Traceback" not in err

    included.write_text(f"{tmp_path}/tiny-2.0-py3-none-any.whl\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    mended = start(tmp_path)
    assert mended.communicate()[0] == "2.0 root PASSIVE a b c\n"


def test_a_python_that_has_the_packages_is_enough(tmp_path: Path) -> None:
    """As in a container. Another version than the one that is named is not enough."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(environment.__file__, tmp_path / "scripts")
    (tmp_path / "scripts" / "hello").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'root'\n")
    (tmp_path / "requirements.txt").write_text("-r more.txt\n")
    (tmp_path / "more.txt").write_text("# All there is.\ntiny==1.0\n")
    with zipfile.ZipFile(make_wheel(tmp_path, "1.0+cu130")) as wheel:
        wheel.extractall(tmp_path / "packages")

    process = start(tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert process.communicate() == ("1.0+cu130 root PASSIVE a b c\n", "")
    assert not (tmp_path / ".venv").exists()

    (tmp_path / "more.txt").write_text("tiny==1.1\n")
    process = start(tmp_path, PYTHONPATH=str(tmp_path / "packages"))
    assert process.communicate()[1].splitlines()[-1].startswith("Installing requirements.txt failed")
    assert (tmp_path / ".venv").exists()


def test_a_folder_that_another_user_owns(tmp_path: Path) -> None:
    """With no .venv, and with one whose Python lies in a home that this user may not enter."""
    strangers, python = {}, SYSTEM_PYTHON
    if os.getuid() == 0:  # root may write anywhere
        strangers, python = {"user": 65534, "group": 65534, "extra_groups": []}, Path("/usr/bin/python3")
        if not python.exists():
            pytest.skip("there is no Python that every user can run")
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder, "clone"), Path(folder, "home")
        (clone / "scripts").mkdir(parents=True)
        home.mkdir()
        (home / "python").symlink_to(python)
        shutil.copy(environment.__file__, clone / "scripts")
        (clone / "scripts" / "hello").write_text(SCRIPT)
        (clone / "requirements.txt").write_text("no-such-package==1.0\n")
        os.chmod(folder, 0o755)
        (clone / "scripts").chmod(0o555)
        clone.chmod(0o755)
        for has_venv in (False, True):
            if has_venv:
                (clone / ".venv" / "bin").mkdir(parents=True)
                (clone / ".venv" / "bin" / "python").symlink_to(home / "python")
            clone.chmod(0o555)
            home.chmod(0o000)
            ended = subprocess.run([python, "scripts/hello"], cwd=clone, capture_output=True, text=True, **strangers)
            clone.chmod(0o755)
            home.chmod(0o755)
            assert ended.returncode == 1
            assert ended.stderr == (
                f"{clone}/.venv has no packages of requirements.txt that this user can run, and cannot be made: "
                f"Permission denied. Run scripts/hello once as the owner of {clone}, with a Python that all can run, "
                "or copy the folder.\n"
            )


def test_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(
        SystemExit, match=r"Python 99\.1 or newer is needed, and this is 3\.\d+: run it as python99\.1 "
    ):
        environment.enter("requirements.txt")


def test_inputs_of_every_kind(tmp_path: Path) -> None:
    text, image = tmp_path / "prompt.txt", tmp_path / "a.png"
    text.write_text("two words = three\n")
    image.touch()
    given = ["title=a=b", "count=3", "scale=2", "size=64", "fast=true", "shape=square", f"image=@{image}"]
    given += [f"images=@{image}", f"images=@{text}"]
    inputs = read_inputs(Example, [f"prompt=@{text}", *given])
    assert inputs == {
        "prompt": "two words = three",
        "title": "a=b",
        "count": 3,
        "scale": 2.0,
        "size": 64,
        "fast": True,
        "shape": "square",
        "image": CogPath(image),
        "images": [CogPath(image), CogPath(text)],
    }
    assert isinstance(inputs["scale"], float)


def test_defaults() -> None:
    inputs = read_inputs(Example, ["title="])
    expected = {"prompt": "", "title": "", "count": 2, "scale": 1.5, "size": None, "fast": False, "shape": "round"}
    assert inputs == {**expected, "image": None, "images": None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prompt", "-i prompt is not of the form name=value."),
        (
            "promt=x",
            "There is no input 'promt'; there are prompt, title, count, scale, size, fast, shape, image, images.",
        ),
        ("count=two", "count must be a whole number, not 'two'."),
        ("count=2.5", "count must be a whole number, not '2.5'."),
        ("count=5", "count must be from 1 to 4, not 5."),
        ("scale=", "scale must be a number, not ''."),
        ("scale=nan", "scale must be 0 or more, not nan."),
        ("size=65", "size must be 64 or less, not 65."),
        ("fast=yes", "fast must be true or false, not 'yes'."),
        ("shape=flat", "shape must be one of round, square, not 'flat'."),
        ("image=a.png", "image is a file: write image=@a.png."),
        ("image=@/no/such.png", "image=@/no/such.png: there is no file /no/such.png."),
        ("images=a.png", "images is a file: write images=@a.png."),
        ("prompt=@/no/such.txt", "prompt=@/no/such.txt: there is no file /no/such.txt."),
        (f"prompt=@{sys.executable}", f"prompt is a text, and {sys.executable} holds none."),
    ],
)
def test_bad_inputs(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_inputs(Example, ["title=x", assignment])
    assert str(caught.value) == message


def test_missing_input() -> None:
    with pytest.raises(InputError, match=r"The input 'title' is missing: A title\."):
        read_inputs(Example, [])


def test_list_of_inputs() -> None:
    lines = list_inputs(Example).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["prompt", "What to draw."],
        ["title", "A title."],
        ["count", "How many. (default 2, from 1 to 4)"],
        ["scale", "How much. (default 1.5, 0 or more)"],
        ["size", "How large. (64 or less)"],
        ["fast", "A switch. (default false)"],
        ["shape", "A shape. (default round, one of round, square)"],
        ["image", "A picture."],
        ["images", "Pictures."],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "promt=x"], "There is no input 'promt'; there are prompt, "),
        (["-i", "width=wide"], "width must be a whole number, not 'wide'.\n"),
        (["-i", "steps_prior=0"], "steps_prior must be from 1 to 50, not 0.\n"),
        (["-i", "aspect_ratio=2:1"], "aspect_ratio must be one of 1:1, 16:9, "),
        (["-i", "disable_safety_checker=1"], "disable_safety_checker must be true or false, not '1'.\n"),
        (["-i", "output_format=gif"], "output_format must be one of webp, jpg, png, not 'gif'.\n"),
        (["-i", "output_format=jpg"], "output_format is jpg, but -o is output.png.\n"),
        (
            ["-o", "apple.txt"],
            "-o must end in .png, .webp, .jpg, .jpeg, or name a folder with a / at its end, unlike a",
        ),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_missing_weights_are_one_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", "/no/such/folder")
    assert main([]) == 1
    assert capsys.readouterr().err == "There is no model folder /no/such/folder.\n"


@pytest.fixture
def made(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "made"
    folder.mkdir()
    files = [folder / f"output-{i}.png" for i in range(2)]
    for file in files:
        Image.new("RGB", (4, 4), "red").save(file)
    return files


def test_one_picture_gets_the_name_that_was_asked_for(made: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "new" / "apple.png"
    assert save(made[:1], str(target)) == [target]
    assert target.read_bytes() == made[0].read_bytes()


def test_several_pictures_are_numbered(made: list[Path], tmp_path: Path) -> None:
    assert save(made, str(tmp_path / "a.b.png")) == [tmp_path / "a.b-1.png", tmp_path / "a.b-2.png"]


def test_pictures_into_a_folder(made: list[Path], tmp_path: Path) -> None:
    for output in (f"{tmp_path}/new/", str(tmp_path)):
        targets = save(made, output)
        assert targets == [Path(output) / "output-0.png", Path(output) / "output-1.png"]
        assert all(target.is_file() for target in targets)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.webp", "WEBP"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.PNG", "PNG"), ("new/", "WEBP")]
)
def test_a_picture_is_made_in_the_format_that_its_name_asks_for(
    tmp_path: Path, name: str, kind: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    inputs = ["prompt=a tree", "width=64", "height=72", "seed=3", "disable_safety_checker=true", "aspect_ratio=9:16"]
    assert main([*(word for text in inputs for word in ("-i", text)), "-o", str(tmp_path) + f"/{name}"]) == 0
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file == tmp_path / ("new/out-0.webp" if name == "new/" else name)
    with Image.open(file) as picture:
        assert (picture.format, picture.size) == (kind, (64, 72))
    assert read_record(file)["picture"]["seed"] == 3


def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    (tmp_path / "file").touch()
    assert main(["-i", "width=64", "-i", "height=64", "-o", f"{tmp_path}/file/apple.png"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/file" in said
    assert "Traceback" not in said


def test_a_folder_takes_any_format(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    inputs = ["width=64", "height=64", "num_images=2", "output_format=jpg"]
    assert main([*(word for text in inputs for word in ("-i", text)), "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.jpg", "out-1.jpg"]
