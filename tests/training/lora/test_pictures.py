"""What a LoRA is trained on: folders and zips, captions, and the sizes of pictures."""

import io
import math
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cascade.sizes import MULTIPLE, SMALLEST, WHOLE
from tests.training.lora.zips import files_of, zipped
from tests.training.small import write_pictures
from training.errors import TrainingError
from training.lora import pictures
from training.lora.pictures import buckets, captioned_pictures, find_pictures
from training.shapes import bucket_size

WORDS = {"caption": "", "prefix": "", "word": ""}


def unpacked(folder: Path, content: bytes) -> Path:
    (folder / "a.zip").write_bytes(content)
    return find_pictures(folder / "a.zip", folder / "out", "input_images")


def test_a_zip_is_the_folder_in_it(tmp_path: Path) -> None:
    files = files_of(write_pictures(tmp_path / "pictures", 3))
    extra = {"__MACOSX/00.png": b"", "._00.png": b"", "a/.hidden/x.png": b"", "notes.pdf": b"x", "../x.exe": b""}
    content = zipped({f"sub/{name}": data for name, data in files.items()} | extra)
    found = captioned_pictures(unpacked(tmp_path, content), 128, **WORDS)
    assert [(one.file.name, one.caption) for one in found] == [
        ("00.png", "a red square"),
        ("01.png", "a green square"),
        ("02.png", "a blue square"),
    ]
    assert not (tmp_path / "x.exe").exists()


def link() -> bytes:
    member = zipfile.ZipInfo("a.png")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    return content.getvalue()


BAD = {
    "no zip": (b"hello", "is not a complete zip file."),
    "empty": (b"", "is not a complete zip file."),
    "cut": (zipped({"a.png": bytes(9999)})[:-40], "is not a complete zip file."),
    "damaged": (
        zipped({"a.png": bytes(99)}).replace(bytes(99), bytes(98) + b"x"),
        "damaged or encrypted zip file: Bad CRC-32",
    ),
    "above": (zipped({"../a.png": b"x"}), "holds '../a.png', whose path leads out of the folder."),
    "absolute": (zipped({"/tmp/a.png": b"x"}), "holds '/tmp/a.png', whose path leads out of the folder."),
    "Windows": (zipped({"..\\a.png": b"x"}), "leads out of the folder."),
    "drive": (zipped({"C:/a.png": b"x"}), "leads out of the folder."),
    "link": (link(), "which is a link, not a picture."),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_zip_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, expected = BAD[name]
    with pytest.raises(TrainingError) as caught:
        unpacked(tmp_path, content)
    assert str(caught.value).startswith("input_images ")
    assert expected in str(caught.value)
    assert not (tmp_path / "a.png").exists()


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 10_000_000)
    bomb = zipped({"a.png": bytes(30_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(TrainingError, match="over 10 MB unpacked, the limit"):
        unpacked(tmp_path, bomb)
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 10_000_000
    monkeypatch.setattr(pictures, "MOST_BYTES_IN_ALL", 15_000_000)
    several = zipped({f"{i}.png": bytes(8_000_000) for i in range(3)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(TrainingError, match="of pictures unpacked, the limit"):
        unpacked(tmp_path, several)
    monkeypatch.setattr(pictures, "MOST_FILES", 2)
    with pytest.raises(TrainingError, match="holds 3 pictures and texts; 2 are the limit"):
        unpacked(tmp_path, several)


def test_what_is_wrong_with_pictures_names_them(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"There are no pictures \(.jpg, .*\) in out"):
        captioned_pictures(unpacked(tmp_path, zipped({"a.gif": b"x"})), 128, **WORDS)
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "01.png").write_bytes((folder / "01.png").read_bytes()[:150])
    with pytest.raises(TrainingError, match=r"01\.png"):
        captioned_pictures(folder, 128, **WORDS)
    (folder / "01.png").write_bytes(b"hello")
    with pytest.raises(TrainingError, match=r"01\.png is not a picture"):
        captioned_pictures(folder, 128, **WORDS)
    (folder / "01.txt").unlink()
    with pytest.raises(TrainingError, match=r"01\.png has no caption: give it 01\.txt"):
        captioned_pictures(folder, 128, **WORDS)
    (folder / "00.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TrainingError, match=r"00\.txt is not UTF-8: byte 4 is 0xe9"):
        captioned_pictures(folder, 128, **WORDS)
    (folder / "00.txt").unlink()
    (folder / "00.txt").symlink_to("/proc/self/mem")  # a file that even root cannot read from its beginning
    with pytest.raises(TrainingError, match=r"00\.txt cannot be read: "):
        captioned_pictures(folder, 128, **WORDS)
    (folder / "00.txt").unlink()
    (folder / "00.png").unlink()
    (folder / "00.png").symlink_to("none.png")
    with pytest.raises(TrainingError, match=r"00\.png cannot be read: No such file"):
        captioned_pictures(folder, 128, caption="a cat", prefix="", word="")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (None, {"caption": "a cat"}, "a cat"),
        ("a dog", {"caption": "a cat"}, "a dog"),
        (" a\n dog ", {"prefix": "photo of "}, "photo of a dog"),
        ("a dog", {"word": "TOK"}, "TOK, a dog"),
        ("a tok dog", {"word": "TOK"}, "a tok dog"),
        (None, {"word": "TOK"}, "TOK"),
        (None, {"word": "TOK", "prefix": "a photo of "}, "TOK, a photo of"),
        (None, {"word": "TOK", "caption": "a photo of TOK"}, "a photo of TOK"),
        ("", {}, ""),
    ],
)
def test_captions(text: str | None, options: dict[str, str], expected: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    if text is not None:
        (tmp_path / "a.txt").write_text(text)
    (found,) = captioned_pictures(tmp_path, 128, **{**WORDS, **options})
    assert found.caption == expected


@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(128, WHOLE))
def test_buckets_keep_the_shape(width: int, height: int, resolution: int) -> None:
    rows, columns = bucket_size(width, height, resolution)
    step = max(MULTIPLE, resolution // 16 // MULTIPLE * MULTIPLE)
    for side in (rows, columns):
        assert side % step == 0
        assert SMALLEST <= side <= WHOLE
    ratio = min(max(width / height, 0.25), 4)
    if SMALLEST + step <= min(rows, columns) and max(rows, columns) <= WHOLE - step:
        # Each side is off by half a step at most.
        assert abs(rows - resolution / math.sqrt(ratio)) <= step / 2 + 1e-6
        assert abs(columns - resolution * math.sqrt(ratio)) <= step / 2 + 1e-6
    assert bucket_size(height, width, resolution) == (columns, rows)


def test_pictures_of_nearly_one_shape_share_a_bucket(tmp_path: Path) -> None:
    for i, size in enumerate([(100, 100), (101, 100), (200, 100), (100, 200), (201, 100)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    found = captioned_pictures(tmp_path, 256, caption="x", prefix="", word="")
    assert list(buckets(found).values()) == [[0, 1], [2, 4], [3]]
