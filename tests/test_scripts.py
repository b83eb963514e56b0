"""The environment that scripts make for themselves, with real virtual environments, and the command line of predict."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from uv import find_uv_bin

from cascade.limits import LIMITS, InputError
from scripts import environment
from scripts.command_line import list_inputs, main, read_inputs, save
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


def unpacked(folder: Path, version: str) -> Path:
    """A folder that has the package, as a Python's own has it."""
    with zipfile.ZipFile(make_wheel(folder, version)) as wheel:
        wheel.extractall(folder / "packages")
    return folder / "packages"


def add_script(root: Path) -> None:
    """The script hello, and what it needs."""
    (root / "scripts").mkdir()
    shutil.copy(environment.__file__, root / "scripts")
    (root / "scripts" / "hello").write_text(SCRIPT)
    (root / "beside.py").write_text("NAME = 'root'\n")


def start(root: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SYSTEM_PYTHON, "scripts/hello", "a", "b c"],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "UV_CACHE_DIR": str(root / "uv"), **variables},
    )


@pytest.fixture
def no_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = os.environ["PATH"].split(os.pathsep)
    monkeypatch.setenv("PATH", os.pathsep.join(one for one in folders if not Path(one, "uv").exists()))


@pytest.mark.slow
def test_environment(tmp_path: Path, no_uv: None) -> None:
    """From nothing, by two scripts at once; again; with a changed requirement; with one that fails; after damage. There is no uv.

    And by a Python that has another version of the package than the one that is named.
    """
    add_script(tmp_path)
    requirements = tmp_path / "requirements.txt"
    included = tmp_path / "more.txt"
    requirements.write_text("-r more.txt\n")
    make_wheel(tmp_path, "1.0")
    included.write_text("tiny==1.0\n")

    both = [start(tmp_path, PIP_FIND_LINKS=str(tmp_path)) for _ in range(2)]
    results = [script.communicate() for script in both]
    assert [out for out, _ in results] == ["1.0 root PASSIVE a b c\n"] * 2, results
    said = "".join(err for _, err in results)
    assert said.count("Installing requirements.txt") == 1
    assert "Successfully installed tiny-1.0" in said

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

    included.write_text("tiny==1.1\n")
    other = start(tmp_path, PYTHONPATH=str(unpacked(tmp_path, "1.0")))
    assert other.communicate()[1].splitlines()[-1].startswith("Installing requirements.txt failed")


@pytest.mark.slow
def test_uv_looks_where_pip_is_told_to_look(tmp_path: Path, no_uv: None) -> None:
    """In an index that pip's file names; the version that is asked for may be in another one, which a variable names."""
    for index, version in (("first", "1.0"), ("second", "2.0")):
        folder = tmp_path / index / "tiny"
        folder.mkdir(parents=True)
        wheel = make_wheel(folder, version)
        (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = {(tmp_path / 'first').as_uri()}\n[list]\nformat = json\n"
    )
    add_script(tmp_path)
    (tmp_path / "requirements.txt").write_text("tiny==2.0\n")
    variables = {
        "PATH": f"{os.path.dirname(find_uv_bin())}:{os.environ['PATH']}",
        "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"),
        "PIP_EXTRA_INDEX_URL": (tmp_path / "second").as_uri(),
        "PIP_NO_INDEX": "0",
    }
    process = start(tmp_path, **variables)
    out, said = process.communicate()
    assert out == "2.0 root PASSIVE a b c\n"
    assert "+ tiny==2.0" in said
    (tmp_path / "requirements.txt").write_text("no-such-package==1.0\n")
    process = start(tmp_path, **variables)
    said = process.communicate()[1].splitlines()
    assert said[-1].startswith("Installing requirements.txt failed")


@pytest.mark.slow
def test_a_python_that_has_the_packages_is_enough(tmp_path: Path) -> None:
    """As in a container."""
    add_script(tmp_path)
    (tmp_path / "requirements.txt").write_text("-r more.txt\n")
    (tmp_path / "more.txt").write_text("# All there is.\ntiny==1.0\n")
    process = start(tmp_path, PYTHONPATH=str(unpacked(tmp_path, "1.0+cu130")))
    assert process.communicate() == ("1.0+cu130 root PASSIVE a b c\n", "")
    assert not (tmp_path / ".venv").exists()


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
                f"Permission denied. Run scripts/hello once as the owner of {clone}, with a Python that all users can run, "
                "or copy the folder.\n"
            )


def test_processes_of_compile_kernels_read_its_file() -> None:
    """Each new process of Python's multiprocessing does, under this name. It must not start the script over."""
    runpy.run_path(str(environment.ROOT / "scripts" / "compile-kernels"), run_name="__mp_main__")


def test_old_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(SystemExit, match=r"Python 99\.1 or newer is needed; this is 3\.\d+\. Run: python99\.1 "):
        environment.enter("requirements.txt")


def test_inputs_of_every_kind(tmp_path: Path) -> None:
    text, image = tmp_path / "prompt.txt", tmp_path / "a.png"
    text.write_text("two words = three\n")
    image.touch()
    given = [
        "negative_prompt=a=b",
        "num_images=3",
        "guidance_scale_prior=2",
        "height=64.0",
        "disable_safety_checker=true",
    ]
    given += ["aspect_ratio=16:9", f"image=@{image}", "mask=alpha", *["outpaint=8"] * 4, f"image_prompts=@{image}"]
    given += ["image_prompts=https://host/b.png", "image_prompt_strengths=0.5", "image_prompt_strengths=2"]
    inputs = read_inputs([f"prompt=@{text}", "seed=1", "seed=2", *given])
    expected = {
        "prompt": "two words = three",
        "negative_prompt": "a=b",
        "num_images": 3,
        "guidance_scale_prior": 2.0,
        "height": 64,
        "disable_safety_checker": True,
        "aspect_ratio": "16:9",
        "image": image,
        "mask": "alpha",
        "outpaint": (8, 8, 8, 8),
        "image_prompts": (image, "https://host/b.png"),
        "image_prompt_strengths": (0.5, 2.0),
        "seed": 2,
    }
    assert {name: value for name, value in inputs.items() if name in expected} == expected
    assert isinstance(inputs["guidance_scale_prior"], float)
    left_out = {name: value for name, value in inputs.items() if name not in expected}
    assert left_out == {name: LIMITS[name].check(name, LIMITS[name].default) for name in left_out}


PROMPT = "a red apple on a green background"


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (PROMPT.encode(), PROMPT),
        (b"\xef\xbb\xbf" + PROMPT.encode(), PROMPT),
        (PROMPT.encode() + b"\r\n", PROMPT),
        (b"\xef\xbb\xbf" + b"one\r\n\r\ntwo\r\n", "one\n\ntwo"),
        (PROMPT.encode("utf-16"), PROMPT),
        (b"\xfe\xff" + PROMPT.encode("utf-16-be"), PROMPT),
        (PROMPT.encode("utf-32"), PROMPT),
        ("é\u2028\ufeffü".encode(), "é\u2028\ufeffü"),
        (b"", ""),
    ],
    ids=["utf-8", "mark", "crlf", "mark and crlf", "utf-16", "utf-16-be", "utf-32", "mark within", "empty"],
)
def test_a_text_file_is_read_as_an_editor_shows_it(tmp_path: Path, content: bytes, prompt: str) -> None:
    """Windows' editors write a byte order mark, which would be a token, and make another picture."""
    (tmp_path / "prompt.txt").write_bytes(content)
    assert read_inputs([f"prompt=@{tmp_path}/prompt.txt"])["prompt"] == prompt


@pytest.mark.parametrize(
    "content", [b"\xe9", PROMPT.encode("utf-16-le"), b"\xff\xfea", b"\x00", b"\x89PNG\r\n\x1a\n\x00"]
)
def test_a_file_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_inputs([f"prompt=@{tmp_path}/p"])
    assert re.fullmatch(
        r"prompt: '.*' is not a text in UTF-8, or in UTF-16 with a byte order mark\.", str(caught.value)
    )


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("prompt", "-i 'prompt' is not of the form name=value."),
        ("promt=x", "There is no input 'promt'; did you mean prompt?"),
        ("xyz=x", "There is no input 'xyz'; -i help lists all."),
        ("num_images=two", "num_images is 'two'; it must be a whole number from 1 to 4."),
        ("num_images=2.5", "num_images is 2.5; it must be a whole number from 1 to 4."),
        ("num_images=5", "num_images is 5; it must be a whole number from 1 to 4."),
        ("guidance_scale_prior=", "guidance_scale_prior is ''; it must be a number from 0 to 20."),
        ("guidance_scale_prior=nan", "guidance_scale_prior is nan; it must be a number from 0 to 20."),
        ("upscale=yes", "upscale is 'yes'; it must be true or false."),
        ("aspect_ratio=flat", "aspect_ratio is 'flat'; it must be one of 1:1, 16:9, "),
        (
            "image=a.png",
            "image is 'a.png'; it must be an http, https or data URL of a picture. A file is given as image=@a.png.",
        ),
        ("image=", "image is ''; it must be an http, https or data URL of a picture. A file is given as image=@file."),
        (
            "image_prompts=a.png",
            "image_prompts[0] is 'a.png'; it must be an http, https or data URL of a picture. "
            "A file is given as image_prompts=@a.png.",
        ),
        ("image=@/no/such.png", "image is '@/no/such.png'; there is no file '/no/such.png'."),
        ("image=@https://host/a.png", "image is '@https://host/a.png'; a URL has no @ before it."),
        ("prompt=@/no/such.txt", "prompt is '@/no/such.txt'; there is no file '/no/such.txt'."),
        (f"image=@{'x' * 5000}", "image is '@xxx"),
        (
            "prompt=@~nobody-of-this-name/a",
            "prompt is '@~nobody-of-this-name/a'; there is no file '~nobody-of-this-name/a'.",
        ),
        ("image_prompt_strengths=7", "image_prompt_strengths[0] is 7; it must be a number from 0 to 2."),
    ],
)
def test_bad_inputs(assignment: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_inputs([assignment])
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


def test_list_of_inputs() -> None:
    lines = dict(line.split(maxsplit=1) for line in list_inputs().splitlines())
    assert list(lines) == list(LIMITS)
    assert lines["num_images"].endswith(" (default 1, from 1 to 4)")
    assert lines["disable_safety_checker"].endswith(" (default false)")
    assert lines["output_format"].endswith(" (default webp, one of webp, jpg, png)")
    assert lines["image"].endswith(".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "promt=x"], "There is no input 'promt'; did you mean prompt?\n"),
        (["-i", "width=wide"], "width is 'wide'; it must be a whole number from 64 to 4096.\n"),
        (["-i", "steps_prior=0"], "steps_prior is 0; it must be a whole number from 1 to 50.\n"),
        (["-i", "aspect_ratio=2:1"], "aspect_ratio is '2:1'; it must be one of 1:1, 16:9, "),
        (["-i", "disable_safety_checker=1"], "disable_safety_checker is '1'; it must be true or false.\n"),
        (["-i", "output_format=gif"], "output_format is 'gif'; it must be one of webp, jpg, png.\n"),
        (["-i", "mask=alpha"], "mask needs image, which is left out.\n"),
        (["-i", "output_format=jpg"], "output_format is jpg, but -o is output.png.\n"),
        (
            ["-o", "apple.txt"],
            "-o is apple.txt; it must end in .png, .webp, .jpg, .jpeg, or / for a folder.",
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
    assert capsys.readouterr().err == (
        "There is no model folder /no/such/folder. scripts/download-weights and scripts/save-weights make one.\n"
    )


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_picture_may_be_a_file_or_a_url(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(model_folder))
    image = Image.effect_noise((64, 72), 90).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 72))
    image.save(tmp_path / "a.png")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"127.0.0.1:{server.server_port}"
    try:
        for place in (f"@{tmp_path}/a.png", f"http://{url}/a.png", f"HTTP://{url}/a.png"):
            inputs = [f"image={place}", "mask=alpha", "seed=1", "steps_prior=1", "steps_decoder=1"]
            assert (
                main([*(word for text in inputs for word in ("-i", text)), "-o", f"{tmp_path}/{len(place)}.png"]) == 0
            )
        assert main(["-i", f"image=http://{url}/gone.png"]) == 1
    finally:
        server.shutdown()
        server.server_close()
    made = [read_pixels(file) for file in tmp_path.glob("[0-9]*.png")]
    assert len({one.tobytes() for one in made}) == 1
    assert (made[0][:, 32:] == read_pixels(tmp_path / "a.png")[:, 32:]).all()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"image could not be downloaded from {url}: the server answered 404 Not Found."


def read_pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


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
