"""The miniature end to end, by the command line of ``scripts/predict``; once in a process of its own, which is measured."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cascade.weights import ModelFolder
from miniature.shipping import check_sizes
from scripts.command_line import main

ROOT = Path(__file__).parent.parent
MINI = ROOT / "weights" / "mini"
PROMPT = "a red apple on a green background"
MEMORY = 1.5 * 2**30
SECONDS = 15

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MINI / "model.json").is_file(), reason="weights/mini is not there"),
]


def arguments(output: Path, *inputs: str) -> list[str]:
    return ["-o", str(output), *(word for text in inputs for word in ("-i", text))]


def measure(output: Path, *inputs: str) -> tuple[list[Path], float, int]:
    """Run the script; returns what it wrote, its seconds of CPU time and its peak memory in bytes."""
    command = [sys.executable, ROOT / "scripts" / "predict", *arguments(output, *inputs)]
    environment = {name: value for name, value in os.environ.items() if name != "CASCADE_WEIGHTS"}
    script = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    peak, seconds = 0, 0.0
    while script.poll() is None:
        peak = max(peak, script.memory_info().rss)
        seconds = max(seconds, sum(script.cpu_times()[:2]))  # user and system; the clock depends on what else runs
        time.sleep(0.05)
    out, err = script.communicate()
    assert script.returncode == 0, err
    return [Path(line) for line in out.splitlines()], seconds, peak


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Path]]:
    """What the script does, in this process, which has imported everything; returns what it wrote."""
    monkeypatch.delenv("CASCADE_WEIGHTS", raising=False)

    def predict(output: Path, *inputs: str) -> list[Path]:
        assert main(arguments(output, *inputs)) == 0, capsys.readouterr().err
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return predict


def read(path: Path) -> np.ndarray:
    """(H, W, 3) in 0..1."""
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255


def corners(pixels: np.ndarray, edge: int = 16) -> np.ndarray:
    """The mean colours of the four corners, (4, 3)."""
    return np.stack(
        [
            pixels[rows, columns].mean((0, 1))
            for rows in (slice(edge), slice(-edge, None))
            for columns in (slice(edge), slice(-edge, None))
        ]
    )


def redness(pixels: np.ndarray) -> np.ndarray:
    """How much more red than anything else a pixel is."""
    return pixels[..., 0] - pixels[..., 1:].max(-1)


def greenness(colours: np.ndarray) -> np.ndarray:
    return colours[..., 1] - np.maximum(colours[..., 0], colours[..., 2])


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, int]:
    output = tmp_path_factory.mktemp("apple") / "apple.png"
    files, seconds, memory = measure(output, f"prompt={PROMPT}", "seed=1")
    assert files == [output]
    return output, seconds, memory


def test_folder_is_whole_and_small() -> None:
    folder = ModelFolder.open(MINI)
    folder.verify()
    assert folder.native_size == 256
    assert not any("_name_or_path" in file.read_text() for file in MINI.rglob("*.json"))
    check_sizes(MINI)


def test_a_red_apple_on_a_green_background(apple: tuple[Path, float, int]) -> None:
    pixels = read(apple[0])
    assert pixels.shape == (256, 256, 3)
    assert (greenness(corners(pixels)) > 0.1).all()
    assert (redness(pixels[64:192, 64:192]) > 0.2).mean() > 0.2


def test_time_and_memory(apple: tuple[Path, float, int]) -> None:
    _, seconds, memory = apple
    assert seconds <= SECONDS
    assert memory <= MEMORY


def test_same_seed_same_picture(
    apple: tuple[Path, float, int], tmp_path: Path, predict: Callable[..., list[Path]]
) -> None:
    """Picture i of seed s is picture 0 of seed s + i, up to rounding of one level."""
    files = predict(tmp_path / "a.png", f"prompt={PROMPT}", "seed=0", "num_images=2")
    assert [file.name for file in files] == ["a-1.png", "a-2.png"]
    first, second = (read(file) for file in files)
    assert np.abs(second - read(apple[0])).max() <= 1.01 / 255
    assert np.abs(first - second).mean() > 0.01


def test_negative_prompt_changes_the_picture(tmp_path: Path, predict: Callable[..., list[Path]]) -> None:
    """What is red goes when red is what the picture should not have."""
    (file,) = predict(tmp_path / "a.png", "prompt=an apple", "negative_prompt=red", "seed=1")
    (plain,) = predict(tmp_path / "b.png", "prompt=an apple", "seed=1")
    assert redness(read(file)).clip(0).mean() < redness(read(plain)).clip(0).mean()


def test_another_shape(tmp_path: Path, predict: Callable[..., list[Path]]) -> None:
    (file,) = predict(tmp_path / "a.webp", f"prompt={PROMPT}", "width=300", "height=202", "seed=1")
    assert read(file).shape == (202, 300, 3)
    assert Image.open(file).format == "WEBP"


@pytest.mark.parametrize("line", ["Device: ", "Seeds: "])
def test_an_interruption_is_one_line(tmp_path: Path, line: str) -> None:
    """While the model loads, and while it makes a picture."""
    command = [sys.executable, ROOT / "scripts" / "predict", *arguments(tmp_path / "a.png", "steps_prior=50")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as script:
        assert any(said.startswith(line) for said in script.stderr)
        script.send_signal(signal.SIGINT)
        rest = script.stderr.read()
    assert rest.endswith("Interrupted.\n")
    assert "Traceback" not in rest
    assert script.returncode == 130
    assert not (tmp_path / "a.png").exists()
