"""scripts/download-weights in its own process, with huggingface_hub's real client, against a local Hub."""

import contextlib
import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade.weights.published import DECODER, PRIOR
from scripts.download_weights import main
from tests.hub.conftest import Script
from tests.hub.serving import TOKEN, Break, Hub

Run = Callable[..., str]

# The client writes pieces of ten mebibytes.
PIECE = 10 << 20
PREVIEWER = "previewer.safetensors"
BASE = [
    "stabilityai/stable-cascade-prior/tokenizer/tokenizer.json",
    "stabilityai/stable-cascade-prior/tokenizer/tokenizer_config.json",
    "stabilityai/stable-cascade-prior/text_encoder/config.json",
    "stabilityai/stable-cascade-prior/text_encoder/model.bf16.safetensors",
    "stabilityai/stable-cascade/vqgan/config.json",
    "stabilityai/stable-cascade/vqgan/diffusion_pytorch_model.bf16.safetensors",
]
FULL = [
    *BASE,
    "stabilityai/stable-cascade-prior/prior/config.json",
    "stabilityai/stable-cascade-prior/prior/diffusion_pytorch_model.bf16.safetensors",
    "stabilityai/stable-cascade/decoder/config.json",
    "stabilityai/stable-cascade/decoder/diffusion_pytorch_model.bf16.safetensors",
]
LITE = [
    *BASE,
    "stabilityai/stable-cascade-prior/prior_lite/config.json",
    "stabilityai/stable-cascade-prior/prior_lite/diffusion_pytorch_model.bf16.safetensors",
    "stabilityai/stable-cascade/decoder_lite/config.json",
    "stabilityai/stable-cascade/decoder_lite/diffusion_pytorch_model.bf16.safetensors",
]
EXTRAS = [
    "Falconsai/nsfw_image_detection/config.json",
    "Falconsai/nsfw_image_detection/model.safetensors",
    "Falconsai/nsfw_image_detection/preprocessor_config.json",
    "stabilityai/stable-cascade/controlnet/canny.safetensors",
    "stabilityai/stable-cascade/controlnet/inpainting.safetensors",
    "stabilityai/stable-cascade/controlnet/super_resolution.safetensors",
    "stabilityai/stable-cascade/previewer.safetensors",
    "stabilityai/stable-cascade-prior/feature_extractor/preprocessor_config.json",
    "stabilityai/stable-cascade-prior/image_encoder/config.json",
    "stabilityai/stable-cascade-prior/image_encoder/model.bf16.safetensors",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "download"


def published_file(hub: Hub, path: str) -> Path:
    """The Hub's file ``<owner>/<name>/<path>``."""
    owner, name, path = path.split("/", 2)
    (files,) = (files for (repository, _), files in hub.repositories.items() if repository == f"{owner}/{name}")
    return files[path].content


def files_in(folder: Path) -> set[str]:
    """All files of a download except download.json and the lock."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return files - {"download.json", ".lock"}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "download.json").read_text())


def previewer_is_whole(hub: Hub, folder: Path) -> bool:
    content = published_file(hub, f"{DECODER.name}/{PREVIEWER}").read_bytes()
    assert files_in(folder) == {f"stable-cascade/{PREVIEWER}"}
    return (folder / "stable-cascade" / PREVIEWER).read_bytes() == content


def incomplete_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], FULL),
        (["--prior", "lite", "--decoder", "lite"], LITE),
        (["--with", "safety,controlnet,previewer,image-encoder"], [*FULL, *EXTRAS]),
    ],
)
def test_just_the_needed_files(hub: Hub, folder: Path, succeed: Run, options: list[str], expected: list[str]) -> None:
    log = succeed("download-weights", "--output", folder, *options)
    assert sorted(hub.fetched()) == sorted(expected)
    assert files_in(folder) == {path.split("/", 1)[1] for path in expected}
    for path in expected:
        assert (folder / path.split("/", 1)[1]).read_bytes() == published_file(hub, path).read_bytes(), path
    assert set(manifest(folder)["files"]) == files_in(folder)
    assert f" in {len(expected)} files into {folder}" in log


def test_progress_is_shown_at_a_terminal(folder: Path, start: Script) -> None:
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = start("download-weights", "--output", folder, "--only", "--with", "image-encoder", stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the signal when a terminal is closed
        while piece := os.read(screen, 1024):
            shown += piece
    os.close(screen)
    assert process.wait() == 0
    assert b"image_encoder/model.bf16.safetensors: 100%" in shown


def test_the_revision_is_pinned(hub: Hub, folder: Path, succeed: Run) -> None:
    """The branch main must not matter."""
    for (name, _), files in list(hub.repositories.items()):
        hub.repositories[name, "main"] = dict.fromkeys(files, next(iter(files.values())))
    succeed("download-weights", "--output", folder, "--only", "--with", "image-encoder")
    assert all(f"/{PRIOR.revision}" in seen.path for seen in hub.seen if "auth-check" not in seen.path)


def test_the_token_goes_to_the_hub_alone(hub: Hub, folder: Path, succeed: Run) -> None:
    succeed("download-weights", "--output", folder, "--only", "--with", "safety", HF_TOKEN=TOKEN)
    assert hub.fetched() == EXTRAS[:3]
    assert {seen.authorization for seen in hub.seen if seen.host == "hub"} == {f"Bearer {TOKEN}"}
    assert {seen.authorization for seen in hub.seen if seen.host == "cdn"} == {None}


def test_only_adds_to_what_is_there(hub: Hub, folder: Path, succeed: Run) -> None:
    succeed("download-weights", "--output", folder)
    succeed("download-weights", "--output", folder, "--only", "--with", "safety")
    assert set(manifest(folder)["files"]) == {path.split("/", 1)[1] for path in [*FULL, *EXTRAS[:3]]}

    hub.seen.clear()
    log = succeed("download-weights", "--output", folder, "--prior", "lite")
    assert hub.fetched() == [path for path in LITE if "prior_lite" in path]  # the rest is there
    assert "; 0.1 MB to fetch." in log
    assert manifest(folder)["parts"] == ["tokenizer", "text_encoder", "prior_lite", "decoder", "vqgan"]


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_is_mended(hub: Hub, folder: Path, succeed: Run, reset: bool) -> None:
    hub.breaks[PREVIEWER] = [Break(PIECE + 1000, reset, until=lambda: incomplete_size(folder) == PIECE)]
    succeed("download-weights", "--output", folder, "--only", "--with", "previewer")
    assert hub.ranges() == [None, f"bytes={PIECE}-"]
    assert previewer_is_whole(hub, folder)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_download_goes_on(hub: Hub, folder: Path, start: Script, succeed: Run, sent: int) -> None:
    arguments = ("download-weights", "--output", folder, "--only", "--with", "previewer")
    process = start(*arguments)
    hub.breaks[PREVIEWER] = [Break(PIECE + 1000, until=lambda: process.poll() is not None)]
    while incomplete_size(folder) < PIECE:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    _, err = process.communicate()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("Interrupted. What has arrived is kept; ")
    assert not (folder / "download.json").exists()

    log = succeed(*arguments)
    assert "15.9 MB in 1 files" in log
    assert "; 5.5 MB to fetch." in log
    assert hub.ranges() == [None, f"bytes={PIECE}-"]
    assert previewer_is_whole(hub, folder)


def test_a_connection_that_keeps_breaking(hub: Hub, folder: Path, fail: Run, succeed: Run) -> None:
    arguments = ("download-weights", "--output", folder, "--only", "--with", "previewer")
    hub.breaks[PREVIEWER] = [Break(0, reset=True)]
    sentence = fail(*arguments)
    assert sentence.startswith(f"The connection to {hub.url} for {DECODER.name} failed (")
    assert sentence.endswith("). What was downloaded is kept; run the same command again.")
    succeed(*arguments)
    assert previewer_is_whole(hub, folder)


def cut(content: bytes) -> bytes:
    return content[:-9]


def lengthen(content: bytes) -> bytes:
    return content + b"0"


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("path", "extra", "change"),
    [
        (PREVIEWER, "previewer", cut),
        (PREVIEWER, "previewer", lengthen),
        (PREVIEWER, "previewer", flip),
        ("image_encoder/config.json", "image-encoder", flip),
    ],
)
def test_what_arrives_wrong_is_removed(
    hub: Hub, folder: Path, fail: Run, path: str, extra: str, change: Callable[[bytes], bytes]
) -> None:
    repository = DECODER if path == PREVIEWER else PRIOR
    right = published_file(hub, f"{repository.name}/{path}").read_bytes()
    wrong = hub.contents[path] = change(right)
    sentence = fail("download-weights", "--output", folder, "--only", "--with", extra)
    problem = "damaged: its checksum differs" if change is flip else f"with {len(wrong)} bytes instead of {len(right)}"
    assert sentence == f"{path} of {repository.name} came {problem}. It was removed; run the same command again."
    assert not any(path in file for file in files_in(folder))
    assert not (folder / "download.json").exists()


def test_damaged_small_files_are_fetched_again(hub: Hub, folder: Path, succeed: Run) -> None:
    arguments = ("download-weights", "--output", folder, "--only", "--with", "image-encoder")
    succeed(*arguments)
    file = folder / "stable-cascade-prior" / "image_encoder" / "config.json"
    right = file.read_bytes()
    file.write_bytes(flip(right))
    hub.seen.clear()
    succeed(*arguments)
    assert hub.fetched() == [f"{PRIOR.name}/image_encoder/config.json"]
    assert file.read_bytes() == right


def test_the_free_disk_is_checked_first(hub: Hub, folder: Path, fail: Run) -> None:
    hub.sizes["prior/diffusion_pytorch_model.bf16.safetensors"] = 10**18
    sentence = fail("download-weights", "--output", folder)
    pattern = (
        f"1000000000.0 GB are still to be fetched, but the disk of {re.escape(str(folder))} has only ([0-9.]+) GB "
        "free: free some, or name a folder on another disk with --output."
    )
    told = re.fullmatch(pattern, sentence)
    assert told, sentence
    assert float(told[1]) == pytest.approx(shutil.disk_usage(folder.parent).free / 1e9, abs=5)  # others use it, too
    assert hub.fetched() == []
    assert not folder.exists()


def test_a_disk_that_fills_up(hub: Hub, folder: Path, fail: Run, succeed: Run) -> None:
    """With a limit on the process's files, the system refuses to write, like with a full disk."""
    arguments = ("download-weights", "--output", folder, "--only", "--with", "previewer")
    limit = PIECE + 1000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    sentence = fail(*arguments, preexec_fn=limited)
    assert sentence == (
        f"{folder / 'stable-cascade' / PREVIEWER} could not be written (File too large). What was downloaded is kept; make "
        "room, and run the same command again."
    )
    assert incomplete_size(folder) == limit
    assert not (folder / "download.json").exists()
    succeed(*arguments)
    assert hub.ranges() == [None, f"bytes={limit}-"]
    assert previewer_is_whole(hub, folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path, fail: Run) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "download"
    assert fail("download-weights", "--output", folder) == f"{folder} cannot be used: Not a directory."


def test_two_downloads_into_one_folder(hub: Hub, folder: Path, start: Script, fail: Run) -> None:
    arguments = ("download-weights", "--output", folder, "--only", "--with", "previewer")
    ended = []
    hub.breaks[PREVIEWER] = [Break(1000, until=lambda: bool(ended))]
    first = start(*arguments)
    while not hub.ranges():
        assert first.poll() is None
        time.sleep(0.01)
    assert fail(*arguments) == f"Another download into {folder} is running: wait for it, or end it."
    ended.append(True)
    assert first.communicate()[1].endswith("scripts/save-weights makes a model folder from it.\n")
    assert previewer_is_whole(hub, folder)


def gate(hub: Hub) -> None:
    hub.gated.add(PRIOR.name)


def remove_repository(hub: Hub) -> None:
    del hub.repositories[PRIOR.name, PRIOR.revision]


def move_revision(hub: Hub) -> None:
    hub.repositories[PRIOR.name, "0" * 40] = hub.repositories.pop((PRIOR.name, PRIOR.revision))


def remove_file(hub: Hub) -> None:
    del hub.repositories[PRIOR.name, PRIOR.revision]["prior/config.json"]


def forbid(hub: Hub) -> None:
    hub.answer = (403, "", "Your token may not read this.")


def break_down(hub: Hub) -> None:
    hub.answer = (503, "", "")


def be_something_else(hub: Hub) -> None:
    hub.answer = (200, "", "Welcome to our hotel")


def nothing(hub: Hub) -> None:
    pass


def speak_plainly(hub: Hub) -> None:
    """Do nothing: the server answers TLS with plain HTTP anyway."""


@pytest.mark.parametrize(
    ("arrange", "variables", "sentence"),
    [
        (
            nothing,
            {"HF_TOKEN": "hf_bad"},
            "{hub} refuses your token: make another at {hub}/settings/tokens, and put it into HF_TOKEN.",
        ),
        (
            nothing,
            {"HF_TOKEN": "\u0445"},
            "Your token, in HF_TOKEN, is not valid: it must consist of ASCII letters and digits.",
        ),
        (
            forbid,
            {"HF_TOKEN": TOKEN},
            "{host} answered 403 Forbidden for {prior}: Your token may not read this.",
        ),
        (
            gate,
            {},
            "{prior} is gated: accept its conditions at {hub}/{prior} with an account there, make a token at "
            "{hub}/settings/tokens, and put it into HF_TOKEN.",
        ),
        (
            gate,
            {"HF_TOKEN": TOKEN},
            "{prior} is gated: accept its conditions at {hub}/{prior} with the account of your token.",
        ),
        (
            remove_repository,
            {},
            "{hub} has no repository {prior}, or shows it only to those with a token, in HF_TOKEN.",
        ),
        (remove_repository, {"HF_TOKEN": TOKEN}, "{hub} has no repository {prior}, or does not show it to your token."),
        (move_revision, {}, "{prior} no longer has the revision {revision}."),
        (remove_file, {}, "{prior} has no file prior/config.json at its revision {revision}."),
        (break_down, {}, "{host} answered 503 Service Unavailable for {prior}: try again later."),
        (
            be_something_else,
            {},
            "{hub} does not answer as the Hub does: a proxy or a login page may answer in its place.",
        ),
        (nothing, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so {hub} cannot be asked for {prior}."),
        (
            nothing,
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            f"The connection to http://127.0.0.1:9 for {{prior}} failed ([Errno {errno.ECONNREFUSED}] Connection refused)"
            ". What was downloaded is kept; run the same command again.",
        ),
        (
            nothing,
            {"ALL_PROXY": "quick://127.0.0.1"},
            "{hub} cannot be asked for {prior}: Unknown scheme for proxy URL URL('quick://127.0.0.1').",
        ),
        (
            nothing,
            {"ALL_PROXY": "socks5://127.0.0.1:9"},
            "{hub} is reached through a SOCKS proxy, which needs the package socksio: "
            f"{sys.executable} -m pip install socksio",
        ),
        (
            nothing,
            {"SSL_CERT_FILE": "/nowhere/ca.pem"},
            "SSL_CERT_FILE is /nowhere/ca.pem, but there is no such file: correct the variable, or unset it.",
        ),
        (
            nothing,
            {"SSL_CERT_FILE": __file__},
            f"SSL_CERT_FILE is {__file__}, but it holds no certificates in PEM form: correct the variable, or unset it.",
        ),
        (
            speak_plainly,
            {"HF_ENDPOINT": "https://{host}"},
            "There is no trusted connection to https://{host} (WRONG_VERSION_NUMBER). If a proxy decrypts "
            "connections, name its certificate in SSL_CERT_FILE.",
        ),
    ],
)
def test_what_the_hub_denies(
    hub: Hub, folder: Path, fail: Run, arrange: Callable[[Hub], None], variables: dict[str, str], sentence: str
) -> None:
    arrange(hub)
    names = {"hub": hub.url, "host": hub.url.partition("//")[2], "prior": PRIOR.name, "revision": PRIOR.revision}
    variables = {name: value.format(**names) if name == "HF_ENDPOINT" else value for name, value in variables.items()}
    assert fail("download-weights", "--output", folder, **variables) == sentence.format(**names)
    assert len(sentence.format(**names)) < 400
    assert hub.fetched() == []
    assert not folder.exists()


def test_a_name_that_is_unknown(folder: Path, fail: Run) -> None:
    sentence = fail("download-weights", "--output", folder, HF_ENDPOINT="http://nowhere.invalid")
    assert re.fullmatch(
        r"The name nowhere\.invalid, or that of a proxy, cannot be resolved \(.+\): check the network, and the variables "
        r"HF_ENDPOINT and HTTPS_PROXY if they are set\.",
        sentence,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only"], "--only needs --with"),
        (
            ["--with", "safety,face"],
            "argument --with: 'face' is not one of controlnet, effnet, previewer, image-encoder, safety",
        ),
        (["--prior", "small"], "argument --prior: invalid choice: 'small' (choose from 'full', 'lite')"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert capsys.readouterr().err.endswith(f"scripts/download-weights: error: {message}\n")
