"""What the front of scripts/serve lets through. tests/http runs all through it, in front of Cog's server."""

import contextlib
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.front import PATHS, RefusedError, check_body, check_path

GOOD = [
    "a",
    "pred_18ebac8c255a3ea0",
    "7v1mwse3g5rme0cqbhrt3j4zxw",
    "550e8400-e29b-41d4-a716-446655440000",
    "a" * 100,
    "x.y:z",
]
BAD = ["", "a" * 101, "a" * 256, "../x", "/tmp/x", "..", ".", "a/b", "a\0", "é", " ", "a b", "-a", "a\n", "%2e"]


def refused(body: bytes) -> int | None:
    """The status of a refusal."""
    try:
        check_body(body)
    except RefusedError as error:
        return error.status
    return None


@pytest.mark.parametrize("identifier", GOOD)
def test_good_ids(identifier: str) -> None:
    assert refused(json.dumps({"id": identifier, "input": {"id": "/x"}}).encode()) is None
    for path in (f"/predictions/{identifier}", f"/predictions/{identifier}/cancel", f"/trainings/{identifier}"):
        assert check_path({"raw_path": path.encode()}) == path.encode()


@pytest.mark.parametrize("identifier", BAD)
def test_bad_ids(identifier: str) -> None:
    for body in ({"id": identifier}, {"input": {"id": "good"}, "id": identifier}):
        assert refused(json.dumps(body).encode()) == 422
        assert refused(json.dumps(body, ensure_ascii=False).encode()) == 422
    assert refused(b' \r\n\t{"id": "good", "id": ' + json.dumps(identifier).encode() + b"}") == 422
    assert refused(b'{"\\u0069d": ' + json.dumps(identifier).encode() + b', "id": "good"}') == 422
    with pytest.raises(RefusedError) as error:
        check_path({"raw_path": f"/predictions/{identifier}".encode()})
    assert error.value.status in (404, 422)


def test_the_sentence() -> None:
    with pytest.raises(RefusedError) as error:
        check_body(json.dumps({"id": "/" * 300}).encode())
    (problem,) = error.value.body["detail"]
    assert problem["loc"] == ["body", "id"]
    assert problem["msg"] == (
        f"id is '{'/' * 50}...'; it must be 1 to 100 letters, digits and _ . : -, beginning with a letter or digit."
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"id": null}',
        b'{"id": 5}',
        b'{"input": {"seed": 1e400}}',
    ],
)
def test_bodies_that_are_left_to_cog(body: bytes) -> None:
    assert refused(body) is None


@pytest.mark.parametrize("body", [b"null", b"[]", b' ["../x", {}, {}, null, []]', b'[{"id": "/x"}]', b'"id"', b"5"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    """Cog takes an array for its fields' values, of which the id is the first."""
    assert refused(body) == 422


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b'\xef\xbb\xbf{"id": "/x"}',
        '{"id": "/x"}'.encode("utf-16"),
        b'{"id": "/x"} x',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b', "id": "/x"}',
    ],
)
def test_what_is_not_json_in_utf8_is_refused(body: bytes) -> None:
    """Not passed on: what Cog made of it might be another text than what was checked."""
    assert refused(body) == 400


def test_values_without_end_are_refused() -> None:
    assert refused(b'{"input": {"seed": [' + b"1," * 900_000 + b"1]}}") is None
    assert refused(b'{"input": {"seed": [' + b"1," * 1_000_001 + b"1]}}") == 413


def test_a_number_of_any_length_hides_nothing() -> None:
    assert refused(b'{"input": {"seed": ' + b"1" * 10_000 + b'}, "id": "/x"}') == 422


@settings(deadline=None)
@given(st.text(st.sampled_from(string.printable + "\0%é"), max_size=30))
def test_only_paths_of_cog_pass(text: str) -> None:
    """As bytes, exactly as sent: nothing that is decoded or normalized later."""
    path = f"/{text}".encode()
    with contextlib.suppress(RefusedError):
        check_path({"raw_path": path})
        assert PATHS.fullmatch(path)
        assert b"%" not in path
        assert path.count(b"/") <= 3
