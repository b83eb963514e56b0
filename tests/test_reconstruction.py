"""scripts/reconstruct: a picture in, the picture that its semantic latents make out; and sentences."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade.images.metadata import SourceType
from cascade.images.reading import read_picture
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.weights.hashing import sha256
from scripts.reconstruction import main
from tests.metadata import read_record, read_texts
from tests.test_pipeline import photo, read

ROOT = Path(__file__).parent.parent
MINI = ROOT / "weights" / "mini"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("new/a.webp", "WEBP"), ("a.jpg", "JPEG")])
def test_it_does_what_the_engine_does(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    photo(100, 75).save(tmp_path / "photo.png")
    asked = [str(tmp_path / "photo.png"), "-o", str(tmp_path / name), "--prompt", "a cat", "--seed", "3"]
    assert main([*asked, "--weights", str(model_folder)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / name}\n"
    with Image.open(tmp_path / name) as made:
        assert (made.format, made.size) == (kind, (100, 75))
        if kind == "PNG":
            expected = Cascade.load(model_folder).reconstruct(photo(100, 75), seed=3, prompt="a cat")
            assert made.tobytes() == expected.tobytes()
    record = read_record(tmp_path / name)
    assert (record["inputs"], record["model"]["name"]) == ({"prompt": "a cat", "seed": 3}, "Tiny")
    assert record["files"] == [{"input": "picture", "sha256": sha256(tmp_path / "photo.png")}]
    assert read_texts(tmp_path / name)[1:] == ("", SourceType.EDITED.value)


def test_it_tells_as_little_as_it_is_asked_to(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(64, 64).save(tmp_path / "photo.png")
    asked = [str(tmp_path / "photo.png"), "-o", str(tmp_path / "a.png"), "--weights", str(model_folder)]
    monkeypatch.setenv("CASCADE_METADATA", "settings")
    assert main([*asked, "--prompt", "a cat"]) == 0
    assert read_record(tmp_path / "a.png")["inputs"] == {"seed": 0}
    monkeypatch.setenv("CASCADE_METADATA", "little")
    assert main(asked) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "CASCADE_METADATA is 'little'; it must be one of full, settings, none."


@pytest.mark.slow
@pytest.mark.skipif(not (MINI / "model.json").is_file(), reason="weights/mini is not there")
def test_what_the_latents_say_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the miniature: the same apple, in other pixels."""
    (apple,) = Cascade.load(MINI).generate(Request("a red apple on a green background"))
    apple.save(tmp_path / "apple.png")
    asked = [tmp_path / "apple.png", "-o", tmp_path / "again.png", "--weights", MINI]
    with caplog.at_level("INFO", "scripts.reconstruction"):
        assert main([str(one) for one in asked]) == 0
    assert "256x256 pixels become 16 x 6 x 6 semantic latents.\n" in caplog.text
    again = read_picture(tmp_path / "again.png", "again")
    # 2.9 of 255; a parrot on this ground differs by 27.
    assert 0 < np.abs(read(again) - read(apple)).mean() < 6


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "There is no file {file}.\n"),
        (b"no picture", "{file} is not a picture in one of the formats JPEG, PNG, "),
        (Image.new("RGB", (63, 80)), "width is 63; it must be from 64 to 4096 pixels.\n"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    tmp_path: Path,
    model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | Image.Image | None,
    sentence: str,
) -> None:
    file = tmp_path / "photo.png"
    if isinstance(content, Image.Image):
        content.save(file)
    elif content is not None:
        file.write_bytes(content)
    assert main([str(file), "-o", str(tmp_path / "made.png"), "--weights", str(model_folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines(keepends=True)[-1].startswith(sentence.format(file=file))
    assert not (tmp_path / "made.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "a.gif"], "error: -o is a.gif; it must end in .png, .webp or .jpg\n"),
        (["--seed", "-1"], "error: --seed is -1; it must be from 0 to 9223372036854775807\n"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["photo.png", *arguments])
    assert capsys.readouterr().err.endswith(message)


def test_missing_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo(64, 64).save(tmp_path / "photo.png")
    assert main([str(tmp_path / "photo.png"), "--weights", "/no/such/folder"]) == 1
    assert capsys.readouterr().err == (
        "There is no model folder /no/such/folder. scripts/download-weights and scripts/save-weights make one.\n"
    )
