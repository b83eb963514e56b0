"""LoRAs of requests: names, URLs, the Hub and Civitai, as local servers answer like them; kept by content."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

from cascade.limits import InputError
from cascade.loras.lora import Lora
from serving import lora_cache, loras
from serving.download import Limits
from serving.lora_cache import Cache
from serving.lora_sources import Local, OnCivitai, OnHub, Web, source_of, without_secrets
from serving.loras import Loras, LoraSettings

ADAPTER = save({"clip_g": torch.ones(1, 8)})
OTHER = save({"clip_g": torch.zeros(1, 8)})


class Handler(BaseHTTPRequestHandler):
    server: "Site"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        answer = self.server.answers.get(urlsplit(self.path).path, 404)
        token = self.server.token
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            answer = 401
        if callable(answer):
            answer(self)
        elif isinstance(answer, int):
            self._send(answer, b"")
        elif isinstance(answer, str):
            self.send_response(302)
            self.send_header("Location", answer)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Site(ThreadingHTTPServer):
    """Answers by path: bytes, JSON, a status, or a text for a redirection."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.token = ""
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass

    def close(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    with contextlib.closing(Site()) as site:
        yield site


@pytest.fixture
def other() -> Iterator[Site]:
    with contextlib.closing(Site()) as site:
        yield site


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "CIVITAI_API_TOKEN", "HF_ENDPOINT", "CIVITAI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def finder(tmp_path: Path) -> Loras:
    return make_finder(tmp_path)


def make_finder(folder: Path, limit: int = 10**9, **limits: Any) -> Loras:
    settings = LoraSettings(Cache(folder / "cache", limit), Limits(**{"size": 10**6, **limits}))
    return Loras(folder / "model" / "loras", settings, public_only=False)


def hub(site: Site, monkeypatch: pytest.MonkeyPatch, *names: str, repository: str = "me/style") -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.answers[f"/api/models/{repository}/revision/main"] = {"siblings": [{"rfilename": name} for name in names]}
    for name in names:
        content = b'{"module_filters": [".attn"]}' if name.endswith(".json") else ADAPTER
        site.answers[f"/{repository}/resolve/main/{name}"] = content


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("style", Local("style")),
        ("my style.safetensors", Local("my style.safetensors")),
        ("me/style", OnHub("me/style")),
        ("me/style/a/b.safetensors", OnHub("me/style", "a/b.safetensors")),
        ("https://huggingface.co/me/style", OnHub("me/style")),
        ("huggingface.co/me/style/", OnHub("me/style")),
        (
            "https://huggingface.co/me/style/resolve/v1/a.safetensors?download=true",
            OnHub("me/style", "a.safetensors", "v1"),
        ),
        ("https://huggingface.co/me/style/blob/main/x/a.safetensors", OnHub("me/style", "x/a.safetensors")),
        ("https://huggingface.co/me/style/tree/v1", OnHub("me/style", None, "v1")),
        ("https://civitai.com/models/314077/animegao", OnCivitai("314077", None)),
        ("civitai.com/models/314077?modelVersionId=353200", OnCivitai("314077", "353200")),
        ("https://civitai.com/api/download/models/353200?type=Model", OnCivitai(None, "353200")),
        ("https://x.org/a.safetensors?token=x", Web("https://x.org/a.safetensors?token=x")),
        ("http://x.org/a.TAR", Web("http://x.org/a.TAR")),
    ],
)
def test_what_texts_say(text: str, source: object) -> None:
    assert source_of("lora_weights[0]", text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../style",
        "/etc/passwd",
        "~/style",
        "a\\b",
        "me/../style",
        "me/style/../../x",
        "me/style//x",
        "file:///etc/passwd",
        "C:style",
        "https://x.org/page.html",
        "https://[::1/a.safetensors",
        "https://huggingface.co/me",
        "https://civitai.com/user/x",
        "https://civitai.com/models/1?modelVersionId=x",
        "ftp://x.org/a.safetensors",
        "\x1f" * 200,
    ],
)
def test_texts_that_say_nothing(text: str) -> None:
    with pytest.raises(
        InputError, match=r"^lora_weights\[2\] is .*; it must be the name of a file in the model folder's"
    ) as error:
        source_of("lora_weights[2]", text)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("style", "style"),
        ("https://me:word@x.org/a.safetensors?token=secret#x", "https://x.org/a.safetensors"),
        ("https://civitai.com/models/1?modelVersionId=2&token=secret", "https://civitai.com/models/1?modelVersionId=2"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_names(finder: Loras) -> None:
    finder.folder.mkdir(parents=True)
    for name in ("style.safetensors", "a.tar", "style.json"):
        (finder.folder / name).write_bytes(ADAPTER)
    assert finder.find(["style", "style.safetensors", "a.tar"], [1.0, 0.5, -1]) == [
        Lora(finder.folder / "style.safetensors", 1.0),
        Lora(finder.folder / "style.safetensors", 0.5),
        Lora(finder.folder / "a.tar", -1),
    ]
    with pytest.raises(
        InputError, match=r"^lora_weights\[0\] is 'other', which is not among .*: it has a.tar, style\.$"
    ):
        finder.find(["other"], [1.0])
    (finder.folder / "gone.safetensors").symlink_to("nowhere")
    (finder.folder / "odd.safetensors").symlink_to("x" * 300)  # longer than a file's name may be
    assert finder.find(["style"], [1.0]) == [Lora(finder.folder / "style.safetensors", 1.0)]
    with pytest.raises(InputError, match=r"is 'gone', which is not among .*: it has a.tar, style\.$"):
        finder.find(["gone"], [1.0])


@pytest.mark.parametrize("length", [256, 5000])
def test_names_too_long_for_a_file(finder: Loras, length: int) -> None:
    finder.folder.mkdir(parents=True)
    with pytest.raises(InputError, match=r"^lora_weights\[0\] is .*, which is not among .*: it has none\.$") as error:
        finder.find(["x" * length], [1.0])
    assert len(str(error.value)) < 200


def test_urls_are_fetched_once(site: Site, finder: Loras) -> None:
    site.answers["/x/my%20style.safetensors"] = ADAPTER
    url = f"{site.url}/x/my%20style.safetensors?token=secret"
    (first,) = finder.find([url], [0.5])
    assert (first.path.read_bytes(), first.path.name, first.scale) == (ADAPTER, "my_20style.safetensors", 0.5)
    assert finder.find([url], [0.5]) == [first]
    assert len(site.asked) == 1


def test_what_has_changed_is_fetched_again(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers["/a.safetensors"] = ADAPTER
    (first,) = finder.find([f"{site.url}/a.safetensors"], [1.0])
    monkeypatch.setattr(lora_cache, "FRESH", 0.0)
    assert finder.find([f"{site.url}/a.safetensors"], [1.0]) == [first]
    site.answers["/a.safetensors"] = OTHER
    (second,) = finder.find([f"{site.url}/a.safetensors"], [1.0])
    assert second.path.read_bytes() == OTHER
    assert len(site.asked) == 3


def test_the_hub(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, monkeypatch, "README.md", "style.safetensors", "style.json")
    (lora,) = finder.find(["me/style"], [1.0])
    assert sorted(path.name for path in lora.path.parent.iterdir()) == ["style.json", "style.safetensors"]
    assert finder.find(["me/style/style.safetensors"], [1.0])[0].path == lora.path
    assert finder.find([f"{site.url}/me/style/resolve/main/style.safetensors"], [1.0])[0].path == lora.path


def test_pefts_folder_on_the_hub(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, monkeypatch, "adapter_config.json", "adapter_model.safetensors", "more.safetensors")
    (lora,) = finder.find(["me/style"], [1.0])
    assert sorted(path.name for path in lora.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_several_files_on_the_hub(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(site, monkeypatch, "a.safetensors", "b.safetensors")
    with pytest.raises(
        InputError, match=r"has 2 safetensors files, a.safetensors, b.safetensors; name one, as in me/style/"
    ):
        finder.find(["me/style"], [1.0])
    assert finder.find(["me/style/b.safetensors"], [1.0])[0].path.name == "b.safetensors"


def test_civitai(site: Site, other: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIVITAI_ENDPOINT", site.url)
    monkeypatch.setenv("CIVITAI_API_TOKEN", "secret")
    site.answers["/api/v1/models/7"] = {"modelVersions": [{"id": 9}, {"id": 8}]}
    site.answers["/api/download/models/9"] = f"{other.url}/storage/a.safetensors?signature=x"
    site.answers["/api/download/models/8"] = OTHER
    other.answers["/storage/a.safetensors"] = ADAPTER
    newest, chosen = finder.find([f"{site.url}/models/7/x", f"{site.url}/models/7?modelVersionId=8"], [1.0, 1.0])
    assert (newest.path.read_bytes(), chosen.path.read_bytes()) == (ADAPTER, OTHER)
    assert {token for _, token in site.asked} == {"Bearer secret"}
    assert {token for _, token in other.asked} == {None}  # whoever stores the files does not get the token


def test_tokens_go_to_their_site_alone(
    site: Site, other: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub(site, monkeypatch, "style.safetensors")
    site.token = "secret"
    site.answers["/me/style/resolve/main/style.safetensors"] = f"{other.url}/a.safetensors"
    other.answers["/a.safetensors"] = ADAPTER
    with pytest.raises(
        InputError, match=r"^lora_weights\[0\] needs a token: the Hub answers 401, and HF_TOKEN is not set\.$"
    ):
        finder.find(["me/style"], [1.0])
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(InputError, match="may not be read with the token in HF_TOKEN: the Hub answers 401"):
        finder.find(["me/style"], [1.0])
    monkeypatch.setenv("HF_TOKEN", "secret")
    with caplog.at_level("DEBUG"):
        finder.find(["me/style", f"{other.url}/a.safetensors"], [1.0, 1.0])
    assert {token for _, token in other.asked} == {None}
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "needs a token: the Hub answers 403"),
        (404, "names something that is not on the Hub, or is private"),
        (500, "500"),
    ],
)
def test_what_sites_refuse(status: int, said: str, site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    site.answers["/api/models/me/style/revision/main"] = status
    with pytest.raises(InputError, match=rf"^lora_weights\[0\] .*{said}"):
        finder.find(["me/style"], [1.0])


def test_answers_that_are_none(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    path = "/api/models/me/style/revision/main"
    for answer, said in ((b"<html>", "not JSON"), ([], "has 0 safetensors files, none"), ({"siblings": [3]}, "has 0")):
        site.answers[path] = answer
        with pytest.raises(InputError, match=said):
            finder.find(["me/style"], [1.0])
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setenv("CIVITAI_ENDPOINT", site.url)
    for answer in ({}, {"modelVersions": []}, {"modelVersions": [{"id": "../x"}]}, []):
        site.answers["/api/v1/models/7"] = answer
        with pytest.raises(InputError, match="has no version to download"):
            finder.find([f"{site.url}/models/7"], [1.0])


def test_limits_leave_nothing(site: Site, tmp_path: Path) -> None:
    site.answers["/large.safetensors"] = bytes(2000)
    finder = make_finder(tmp_path, size=1000)
    with pytest.raises(InputError, match=r"larger than 0\.001 MB"):
        finder.find([f"{site.url}/large.safetensors"], [1.0])
    site.answers["/silent.safetensors"] = lambda handler: time.sleep(3)
    finder = make_finder(tmp_path, idle_seconds=0.5)
    with pytest.raises(InputError, match=r"nothing came for 0\.5 seconds"):
        finder.find([f"{site.url}/silent.safetensors"], [1.0])
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() or path.name.startswith("making")] == []
    assert (loras.LIMITS.seconds, loras.LIMITS.idle_seconds, loras.LIMITS.size) == (900, 30, 4 * 10**9)


def test_a_cancellation_is_heard_at_once(site: Site, finder: Loras, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cog raises an exception between two instructions of the thread that waits."""
    site.answers["/slow.safetensors"] = lambda handler: time.sleep(30)
    waits = []

    def cancelled(*given: Any) -> Any:
        waits.append(1)
        if len(waits) == 3:
            raise KeyboardInterrupt
        return wait(*given)

    from serving import image_urls

    wait = image_urls.wait
    monkeypatch.setattr(image_urls, "wait", cancelled)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        finder.find([f"{site.url}/slow.safetensors"], [1.0])
    assert time.monotonic() - start < 5
    assert not list((finder.settings.cache.root).glob("making-*"))


def test_the_least_recently_used_goes_first(site: Site, tmp_path: Path) -> None:
    contents = {name: save({"clip_g": torch.full((1, 100), float(i))}) for i, name in enumerate("abcd")}
    for name, content in contents.items():
        site.answers[f"/{name}.safetensors"] = content
    finder = make_finder(tmp_path, limit=3 * len(contents["a"]))

    def use(*names: str) -> list[Path]:
        return [
            lora.path for lora in finder.find([f"{site.url}/{name}.safetensors" for name in names], [1.0] * len(names))
        ]

    for place, name in enumerate("abc"):
        os.utime(use(name)[0].parent, (place, place))
    (first,) = use("a")
    os.utime(first.parent)
    (last,) = use("d")
    kept = sorted(path.read_bytes() for path in (tmp_path / "cache" / "files").rglob("*.safetensors"))
    assert kept == sorted(contents[name] for name in "acd")
    # What one request uses is kept, even beyond the limit.
    assert all(path.is_file() for path in use("a", "b", "c", "d"))
    assert last.is_file()


def test_a_damaged_cache_is_made_anew(site: Site, finder: Loras) -> None:
    site.answers["/a.safetensors"] = ADAPTER
    url = f"{site.url}/a.safetensors"
    (first,) = finder.find([url], [1.0])
    (entry,) = (finder.settings.cache.root / "sources").iterdir()
    for content in ("", "[]", '{"digest": "../..", "time": 1e12}', '{"digest": 3}'):
        entry.write_text(content)
        assert finder.find([url], [1.0]) == [first]
    assert len(site.asked) == 5


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_LORA_CACHE", str(tmp_path))
    monkeypatch.setenv("CASCADE_LORA_GIGABYTES", "0.5")
    assert LoraSettings.from_environment().cache == Cache(tmp_path, 500_000_000)
    monkeypatch.setenv("CASCADE_LORA_GIGABYTES", "none")
    with pytest.raises(ValueError, match="CASCADE_LORA_GIGABYTES is 'none'"):
        LoraSettings.from_environment()


def test_errors_of_the_engine_are_said_in_the_requests_words(finder: Loras) -> None:
    error = InputError("loras[1]: /cache/x/a.safetensors (a format) does not fit.")
    given = [Lora("/cache/y/b.safetensors"), Lora("/cache/x/a.safetensors")]
    said = finder.explained(error, ["b", "https://x.org/a.safetensors?token=secret"], given)
    assert str(said) == "lora_weights[1]: 'https://x.org/a.safetensors' (a format) does not fit."
    assert str(finder.explained(InputError("width is 3."), ["b"], given[:1])) == "width is 3."
