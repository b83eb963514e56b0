"""What data URLs hold: as urllib decodes them, in a bounded time and in bounded memory."""

import base64
import time
import tracemalloc
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.data_urls import PIECE, data_of


def decoded(url: str, piece: int = PIECE) -> bytes | None:
    """None: it cannot be decoded."""
    try:
        return b"".join(data_of(url, piece))
    except ValueError:
        return None


@settings(deadline=None)
@given(
    st.binary(max_size=40),
    st.sampled_from(["data:,", "data:text/plain,", "DATA:image/png;BASE64,", "data:;base64,"]),
    st.integers(3, 20),
    st.booleans(),
)
def test_content_comes_back(content: bytes, head: str, piece: int, escaped: bool) -> None:
    """Whole, wherever it is cut; base64 with line breaks, as MIME has them, and escaped as in a query."""
    if "base64" in head.lower():
        text = base64.encodebytes(content).decode()
        text = quote(text, safe="") if escaped else text
    else:
        text = quote(content, safe="")
    assert decoded(head + text, piece) == content


@settings(deadline=None)
@given(st.text(st.sampled_from("%%%4aFg=+/!Aé\n,;"), max_size=30), st.integers(3, 9))
def test_escapes_are_read_as_urllib_reads_them(text: str, piece: int) -> None:
    assert decoded(f"data:,{text}", piece) == unquote_to_bytes(text)


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,A", "data:;base64,AAAAA", "data:,\ud800"]
)
def test_what_cannot_be_decoded(url: str) -> None:
    assert decoded(url) is None


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["%41", "%", "A", "=", "!", "é"])
@pytest.mark.parametrize("head", ["data:,", "data:image/png;base64,"])
def test_a_long_one(head: str, sign: str) -> None:
    url = head + sign * (24_000_000 // len(sign))
    start = time.process_time()
    for _ in data_of(url):
        pass
    assert time.process_time() - start < 2
    tracemalloc.start()
    for _ in data_of(url):
        pass
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
