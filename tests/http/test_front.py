"""Ids that would end the service, sent to it as anybody can; and that the front changes nothing else."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from tests.http.serving import ANSWER, ROOT, SMALL, Server, wait_for

BAD = ["a" * 256, "a\0b", "/tmp/cascade-made-by-an-id", "../../../tmp/cascade-made-by-an-id", "..", ""]


def send(server: Server, head: str, body: bytes = b"") -> bytes:
    """The answer to bytes that no client library would send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER) as client:
        request = f"{head}\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        client.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_ids_that_would_end_the_service_are_refused(server: Server) -> None:
    for identifier in BAD:
        answer = server.send({"id": identifier, "input": SMALL})
        assert answer.status_code == 422
        (problem,) = answer.json()["detail"]
        assert problem["loc"] == ["body", "id"]
        assert problem["msg"].startswith("id is ")
        assert "it must be 1 to 100 letters" in problem["msg"]
        # Cog's fields in their order: id, input, context, webhook, webhook_events_filter.
        assert server.send([identifier, SMALL, {}, None, ["completed"]]).status_code == 422
    body = json.dumps({"input": SMALL}).encode()
    for path in ("a" * 256, "a%00b", "%2Ftmp%2Fx", "..%2f..%2fx", "%2e%2e", "..", "/tmp/x", "x/../%2Ftmp%2Fx"):
        for prefix in ("/predictions/", "/trainings/", "//predictions/", "/x/../predictions/", "/predictions//"):
            answer = send(server, f"PUT {prefix}{path} HTTP/1.1", body)
            assert answer.split()[1] in (b"404", b"422"), (prefix, path, answer)
    assert not Path("/tmp/cascade-made-by-an-id").exists()
    server.predict(**SMALL)


def test_an_id_of_every_usual_kind(server: Server) -> None:
    for identifier in ("550e8400-e29b-41d4-a716-446655440000", "7v1mwse3g5rme0cqbhrt3j4zxw", "a.b:c_d", "a" * 100):
        server.wait_until("READY")
        assert server.put(identifier, SMALL, id=identifier).json()["id"] == identifier
    server.wait_until("READY")
    assert server.put("a", SMALL, id="b").status_code == 422


def test_bodies(server: Server) -> None:
    """Chunked, as from a stream; too large; and one that never comes whole."""
    body = json.dumps({"id": "chunked", "input": SMALL}).encode()
    headers = {"Content-Type": "application/json"}
    server.wait_until("READY")
    answer = requests.post(
        f"{server.url}/predictions", data=iter([body[:5], body[5:]]), headers=headers, timeout=ANSWER
    )
    assert answer.json()["id"] == "chunked"
    server.wait_until("READY")
    head = "POST /predictions HTTP/1.1\r\nTransfer-Encoding: chunked"
    answer = send(server, head, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))  # and a length, of something else
    assert answer.startswith(b"HTTP/1.1 200"), answer
    large = {"input": {"image": "data:image/png;base64," + "A" * (105 * 2**20)}}
    assert server.send(large).status_code == 413
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER) as client:
        client.sendall(b"POST /predictions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    server.predict(**SMALL)


def test_bodies_are_not_kept(server: Server) -> None:
    """Not even one of them."""
    (front,) = (process for process in server.process.children() if "serving.front" in process.cmdline())
    server.predict(**SMALL)
    before = front.memory_info().rss
    for _ in range(3):
        server.wait_until("READY")
        server.post({**SMALL, "prompt": "a" * 40_000_000})
    wait_for(lambda: front.memory_info().rss - before < 30e6, ANSWER, "an end of what the front keeps")


def test_requests_one_after_another_are_not_at_capacity(server: Server) -> None:
    """Cog answers a moment before it takes the next request."""
    server.wait_until("READY")
    with requests.Session() as session:
        answers = [session.post(f"{server.url}/predictions", json={"input": SMALL}, timeout=ANSWER) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}


def test_many_at_once_are_at_capacity(server: Server) -> None:
    with server.busy("first"):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(server.post(SMALL))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {409}
        assert all("At capacity" in answer.text for answer in answers)


def test_unknown_paths_are_not_found(server: Server) -> None:
    for path in ("/docs", "/nothing", "/a/b/c", "/predictions/x/y"):
        assert requests.get(server.url + path, timeout=ANSWER).status_code == 404
    assert requests.get(f"{server.url}/health-check?x=1", timeout=ANSWER).status_code == 200


def test_localhost_is_both_of_its_addresses_until_the_server_ends(tmp_path: Path) -> None:
    """Whatever becomes of Cog's server, the front ends with it, and the port is free again."""
    server = Server(tmp_path, "--host", "localhost")
    try:
        for address in sorted({found[4][0] for found in socket.getaddrinfo("localhost", None)}):
            if not has_address(address):
                continue
            url = f"http://{f'[{address}]' if ':' in address else address}:{server.port}/health-check"
            server.wait_until("STARTING", "READY")
            assert requests.get(url, timeout=ANSWER).json()["status"] in ("STARTING", "READY")
        server.process.kill()
        server.process.wait(ANSWER)
        wait_for(lambda: is_free(server.port), ANSWER, "the front's end")
    finally:
        server.stop()


def has_address(address: str) -> bool:
    """Whether this machine has it: IPv6 may be off although localhost names one."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("nonsense", "it must be an http or https URL"),
        ("ftp://x/", "it must be an http or https URL"),
        ("http://", "it must be an http or https URL"),
        ("http://x:y/", "it must be an http or https URL"),
        ("https://x/y?z=1", "it must have no query and no fragment"),
    ],
)
def test_an_upload_url_that_cannot_be(url: str, reason: str) -> None:
    command = [sys.executable, ROOT / "scripts" / "serve", "--upload-url", url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER)
    assert (ended.returncode, ended.stderr) == (1, f"--upload-url is '{url}'; {reason}.\n")
