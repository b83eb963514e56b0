"""Settings from files: ours, others', damaged ones, and those of other versions."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade.images.metadata import Metadata, SourceType, read_description, save_picture
from cascade.limits import InputError
from serving.record import read_record
from studio.fields import read_fields
from studio.masks import before, rectangle, strokes_of
from studio.recall import recall
from studio.session import Cancelled, Session

FIELDS = read_fields()


def saved(path: Path, **record: Any) -> Path:
    """A picture file with a record."""
    save_picture(Image.new("RGB", (8, 8)), path, [Metadata(SourceType.CREATED, json.dumps(record))])
    return path


def whole(session: Session, **changes: Any) -> dict[str, Any]:
    origin = session.service.origin
    return {
        "inputs": {"prompt": "a leaf", "seed": 3},
        "picture": {"index": 1},
        "model": dict(origin.model),
        "device": dict(origin.device),
        "versions": dict(origin.versions),
        **changes,
    }


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_record_is_read_from_every_format(tmp_path: Path, ending: str) -> None:
    assert read_record(saved(tmp_path / f"a.{ending}", inputs={"prompt": "ü 🐙"})) == {"inputs": {"prompt": "ü 🐙"}}


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_has_no_description(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert read_description(tmp_path / "a.png") == ""
    assert read_record(tmp_path / "a.png") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inputs": 3}', "[" * 100_000, "a caption"])
def test_other_descriptions_are_no_records(tmp_path: Path, text: str) -> None:
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png", [Metadata(SourceType.CREATED, text)])
    assert read_record(tmp_path / "a.png") is None


@pytest.mark.slow
def test_settings_come_back_with_what_may_differ(session: Session, tmp_path: Path) -> None:
    found = recall(session, saved(tmp_path / "a.png", **whole(session)), FIELDS)
    assert (found.inputs, found.index, found.lacking, found.remarks) == ({"prompt": "a leaf", "seed": 3}, 1, (), ())
    old = whole(session, inputs={"seed": 3, "gone": 1}, model={"name": "Another"}, files=[{"input": "image"}])
    found = recall(session, saved(tmp_path / "b.png", **old), FIELDS)
    assert found.inputs == {"seed": 3}
    assert found.lacking == (("image", ""),)
    assert found.remarks == (
        "There is no input gone now.",
        "The file does not hold all of its prompts.",
        "It was made with other weights (Another), so the picture will differ.",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"inputs": {"width": "wide"}}, "width is 'wide'; it must be a whole number from 64 to 2048."),
        ({"files": [3]}, "The settings in a.png are damaged."),
        ({"picture": None}, "The settings in a.png are damaged."),
        ({"model": 3}, "The settings in a.png are damaged."),
    ],
)
def test_damaged_settings_are_refused(session: Session, tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(InputError) as raised:
        recall(session, saved(tmp_path / "a.png", **whole(session, **changes)), FIELDS)
    assert str(raised.value) == error


@pytest.mark.slow
def test_requests_wait_for_one_another_and_are_cancelled(session: Session) -> None:
    given = {name: one.default for name, one in FIELDS.items()} | {"steps_prior": 4, "steps_decoder": 1}
    first = session.make(given, threading.Event())
    assert next(first).total > 0
    waits = threading.Event()
    second = session.make(given, waits)
    assert (next(second).total, next(second).made) == (0, ())
    waits.set()
    with pytest.raises(Cancelled):
        next(second)
    states = list(first)
    assert any(state.previews for state in states)
    (made,) = states[-1].made
    assert session.made[-1] is made
    # A page that is closed leaves its request, and the next one begins.
    left = session.make(given, threading.Event())
    next(left)
    left.close()
    assert list(session.make(given, threading.Event()))[-1].made


def test_strokes_are_a_mask() -> None:
    layer = np.zeros((6, 8, 4), np.uint8)
    assert strokes_of({"layers": [Image.fromarray(layer)]}) is None
    assert strokes_of(None) is None
    layer[2:4, 3:5] = 255
    layer[0, 0, 3] = 127  # the faint edge of a brush
    assert strokes_of({"layers": [Image.fromarray(layer)]}).getbbox() == (3, 2, 5, 4)


def test_a_rectangle_is_a_mask(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(file)
    assert rectangle("1, 2; 40 30", file).getbbox() == (1, 2, 40, 30)
    for wrong in ("1, 2, 41, 30", "5, 2, 5, 30", "1, 2, 3", "a"):
        with pytest.raises(InputError, match=r"^mask is the rectangle .*in an image of 40x30\.$"):
            rectangle(wrong, file)
    with pytest.raises(InputError, match="mask needs image"):
        rectangle("1, 2, 3, 4", None)


def test_before_lies_under_after(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(file)
    assert before(file, None, 80, 60).size == (80, 60)
    assert before(file, [0, 0, 0, 10], 40, 40).size == (40, 40)
