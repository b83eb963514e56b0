"""Downloads from hosts on this machine: what works, every limit, every failure, and which addresses are refused."""

import logging
import shutil
import socket
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import network
from serving.download import DownloadError, Limits, StoppedError, download, tls_context
from serving.network import is_public
from tests.serving.web import Web, certificate, picture, raw_server

QUICK = Limits(seconds=0.6, idle_seconds=0.6, size=1_000_000)
PATIENT = Limits(seconds=60, idle_seconds=60, size=1_000_000)


def fail(url: str, target: Path, limits: Limits = PATIENT, **options: Any) -> str:
    """Why a download fails. It leaves no file."""
    start = time.monotonic()
    with pytest.raises(DownloadError) as failed:
        download(url, target, limits, **options)
    assert time.monotonic() - start < limits.seconds + 1
    assert not target.exists()
    return str(failed.value)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_a_picture(web: Web, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its URL may hold secrets, so no log has it."""
    caplog.set_level(logging.INFO)
    size = download(f"{web.url}/picture?token=secret", target)
    assert target.read_bytes() == picture()
    assert size == len(picture())
    assert "secret" not in caplog.text


def test_scheme_and_host_in_any_case(web: Web, target: Path) -> None:
    download(web.url.upper().replace("127.0.0.1", "LOCALHOST") + "/picture", target)
    assert target.read_bytes() == picture()


def test_redirects_are_followed_and_other_hosts_get_no_token(web: Web, target: Path) -> None:
    other = Web()
    try:
        download(
            f"{web.url}/redirect?to={other.url}/picture", target, headers={"Authorization": "Bearer x", "X-Own": "y"}
        )
    finally:
        other.stop()
    assert target.read_bytes() == picture()
    assert web.headers[0]["Authorization"] == "Bearer x"
    assert "Authorization" not in other.headers[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("status?code=404&secret=x", "the server answered 404 Not Found"),
        ("status?code=500", "the server answered 500 Internal Server Error"),
        ("status?code=204", "the server answered 204 No Content"),
        ("status?code=799", "the server answered 799"),
        ("redirect?to=/status%3Fcode%3D404", "the server answered 404 Not Found"),
        ("redirect", "it redirects more than 5 times"),
        ("redirect?to=file:///etc/passwd", "it is, or redirects to, something that is not a valid http or https URL"),
        ("redirect?to=http://:x/", "it is, or redirects to, something that is not a valid http or https URL"),
        ("endless", "it is larger than 1 MB"),
        ("announced?size=1000001", "it is larger than 1 MB"),
        ("slow-body", "it took longer than 0.6 seconds"),
        ("drip", "it took longer than 0.6 seconds"),
        ("silent", "it took longer than 0.6 seconds"),
        ("cut", "the server's answer is not HTTP, or not complete"),
        ("no-http", "the server's answer is not HTTP, or not complete"),
        ("packed", "the server's answer is compressed in a way that cannot be undone"),
    ],
)
def test_what_fails_is_one_clause_and_leaves_nothing(web: Web, target: Path, path: str, reason: str) -> None:
    limits = QUICK if "0.6 seconds" in reason else PATIENT
    assert fail(f"{web.url}/{path}", target, limits).startswith(reason)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://no.such.host.invalid/", "its host cannot be resolved"),
        ("http://127.0.0.1:99999/", "nothing answers there"),
        ("http://127.0.0.1:0/", "nothing answers there"),
        ("http:///picture", "it is, or redirects to, something that is not a valid http or https URL"),
        ("http://[::1/", "it is, or redirects to, something that is not a valid http or https URL"),
        ("http://a\0b/", "it is, or redirects to, something that is not a valid http or https URL"),
        ("ftp://127.0.0.1/", "it is, or redirects to, something that is not a valid http or https URL"),
        (f"http://{'a' * 70}.com/", "its host cannot be resolved"),
    ],
)
def test_urls_that_lead_nowhere(url: str, reason: str, target: Path) -> None:
    assert fail(url, target) == reason


def test_nothing_for_a_while(web: Web, target: Path) -> None:
    limits = Limits(seconds=30, idle_seconds=0.4)
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"^nothing came for 0\.4 seconds$"):
        download(f"{web.url}/silent", target, limits)
    assert time.monotonic() - start < 2


def test_three_gigabytes_end_at_the_limit(web: Web, target: Path) -> None:
    assert fail(f"{web.url}/endless", target, Limits()) == "it is larger than 100 MB"
    assert web.sent < 150e6


@pytest.mark.slow
def test_it_can_be_stopped(web: Web, target: Path) -> None:
    for path in ("slow-body", "silent", "drip"):
        stop = threading.Event()
        threading.Timer(0.3, stop.set).start()
        start = time.monotonic()
        with pytest.raises(StoppedError):
            download(f"{web.url}/{path}", target, Limits(), stop=stop)
        assert time.monotonic() - start < 1.5
        assert not target.exists()


@pytest.mark.slow
def test_a_resolver_and_a_handshake_that_take_for_ever(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raw_server(lambda connection: time.sleep(5)) as port:
        assert fail(f"https://127.0.0.1:{port}/", target, QUICK) == "it took longer than 0.6 seconds"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5) or [])
    assert fail("http://slow.invalid/", target, QUICK) == "it took longer than 0.6 seconds"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_certificates(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    web = Web()
    web.socket = context.wrap_socket(web.socket, server_side=True)
    url = f"https://localhost:{web.server_port}/picture"
    try:
        tls_context.cache_clear()
        assert fail(url, target, Limits(seconds=20)) == (
            "the server's TLS certificate is not valid (self-signed certificate)"
        )
        tls_context.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        download(url, target)
        assert target.read_bytes() == picture()
        target.unlink()
        # A certificate is of a name, whatever address that has.
        assert "not valid" in fail(url.replace("localhost", "127.0.0.1"), target)
        tls_context.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
        assert fail(url, target) == "SSL_CERT_FILE names no readable certificates"
    finally:
        tls_context.cache_clear()
        web.stop()


def test_no_tls_where_tls_was_asked_for(web: Web, target: Path) -> None:
    assert fail(web.url.replace("http", "https"), target) == "the TLS handshake failed"


def test_a_folder_that_cannot_be_written(web: Web, tmp_path: Path) -> None:
    reason = fail(f"{web.url}/picture", tmp_path / "nowhere" / "file")
    assert reason == "it could not be stored (No such file or directory)"


PRIVATE = """
    0.0.0.0 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.0.1 168.63.129.16 169.254.169.254 172.16.0.1
    192.0.0.192 192.0.2.1 192.168.1.1 198.18.0.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b:1::1 2001::1
    2001:db8::1 2002:7f00:1:: fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1
"""


def test_which_addresses_are_public() -> None:
    for address in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)
    for address in PRIVATE.split():
        assert not is_public(address), address


@settings(deadline=None)
@given(st.ip_addresses(v=4))
def test_ipv6_forms_of_an_ipv4_address_are_as_public_as_it_is(address: Any) -> None:
    assert is_public(f"::ffff:{address}") == is_public(f"64:ff9b::{address}") == is_public(str(address))
    assert is_public(str(address)) <= address.is_global


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "127.1", "0", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_private_addresses_in_all_their_forms(host: str, web: Web, target: Path) -> None:
    """And nothing tells an open port from a closed one, or a private name from none."""
    reason = "its host has no public address"
    assert fail(f"http://{host}:{web.server_port}/picture", target, public_only=True) == reason
    assert fail(f"http://{host}:9/picture", target, public_only=True) == reason
    assert fail("http://no.such.host.invalid/", target, public_only=True) == reason
    assert not web.asked


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """127.0.0.2 counts as public: there is no other address here that a test may use."""
    monkeypatch.setattr(network, "is_public", lambda address: address == "127.0.0.2" or is_public(address))
    try:
        outer = Web("127.0.0.2")
    except OSError:
        pytest.skip("this machine has no 127.0.0.2")
    inner = Web("127.0.0.1", outer.server_port)
    yield outer, inner
    outer.stop()
    inner.stop()


def test_a_redirect_to_a_private_address(inside: Any, target: Path) -> None:
    outer, inner = inside
    download(f"{outer.url}/picture", target, public_only=True)
    target.unlink()
    for to in (inner.url, f"http://localhost:{inner.server_port}"):
        reason = fail(f"{outer.url}/redirect?to={to}/picture", target, public_only=True)
        assert reason == "its host has no public address"
    assert not inner.asked


def test_a_name_that_changes_its_address(inside: Any, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: public when it is checked, private when it is connected to."""
    outer, inner = inside
    answers = ["127.0.0.2", "127.0.0.1", "127.0.0.1"]
    resolve = socket.getaddrinfo

    def rebind(host: str, *options: Any, **more: Any) -> Any:
        return resolve(answers.pop(0) if host == "rebind.invalid" else host, *options, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    url = f"http://rebind.invalid:{outer.server_port}/picture"
    download(url, target, public_only=True)
    assert outer.asked["/picture"] == 1
    target.unlink()
    assert fail(url, target, public_only=True) == "its host has no public address"
    assert not inner.asked


def test_of_several_addresses_the_public_ones_are_tried(
    inside: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, inner = inside
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda _, *options, **more: resolve("127.0.0.1", *options, **more) + resolve("127.0.0.2", *options, **more),
    )
    download(f"http://both.invalid:{outer.server_port}/picture", target, public_only=True)
    assert outer.asked["/picture"] == 1
    assert not inner.asked


def test_failures_at_public_addresses_sound_alike(inside: Any, target: Path) -> None:
    outer, _ = inside
    closed = f"http://127.0.0.2:{9}/"
    said = {fail(url, target, public_only=True) for url in (closed, f"{outer.url}/no-http", f"{outer.url}/cut")}
    assert said == {"its server gave no answer"}
    assert fail(f"{outer.url}/status?code=404", target, public_only=True) == "the server answered 404 Not Found"


def test_proxies(web: Web, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is asked for the whole URL; not for what NO_PROXY names; and not if addresses must be public."""
    asked = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(1000).split(b"\r\n")[0].decode())
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    with raw_server(answer) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://name:word@127.0.0.1:{port}")
        monkeypatch.setenv("http_proxy", f"http://name:word@127.0.0.1:{port}")
        download("http://behind.invalid/a?b", target)
        assert target.read_bytes() == b"hi"
        assert asked == ["GET http://behind.invalid/a?b HTTP/1.1"]
        target.unlink()
        assert fail("http://behind.invalid/a", target, public_only=True) == "its host has no public address"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        download(f"{web.url}/picture", target)
        assert len(asked) == 1
    target.unlink()
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    assert fail("http://behind.invalid/", target) == "the proxy that the environment names is not an http or https URL"
