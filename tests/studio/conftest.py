"""The miniature's page, served in this process, and a browser for it.

Imports of Gradio, Playwright and torch stand in functions: whoever runs other tests reads this file, too.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import MINI

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request

    from studio.session import Session

# Milliseconds: a busy machine is no fault of the page.
PATIENCE = 60_000
# Pixels, the edge of the square that is made when no size is asked for.
SIDE = 128


@pytest.fixture(scope="package")
def session(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Session]":
    """Of the miniature, but with pictures of a quarter of its pixels."""
    from studio import door
    from tests.components import copy_mini

    if not (MINI / "model.json").is_file():
        pytest.skip("weights/mini is not there")
    weights = copy_mini(tmp_path_factory.mktemp("weights") / "mini", copy=os.symlink)
    content = json.loads((weights / "model.json").read_text())
    (weights / "model.json").write_text(json.dumps(content | {"native_size": SIDE}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(weights))
        patch.setenv("CASCADE_DEVICE", "cpu")
        for name in ("CASCADE_METADATA", "CASCADE_DTYPE", "CASCADE_MEMORY"):
            patch.delenv(name, raising=False)
        folder = tmp_path_factory.mktemp("studio")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))  # set anew by `load`, and so restored
        yield door.load(folder, folder / "pictures")


@pytest.fixture(scope="package")
def address(session: "Session") -> Iterator[str]:
    from studio import door

    with door.served(session) as address:
        yield address


@pytest.fixture(scope="package")
def browser() -> "Iterator[Browser]":
    from playwright.sync_api import expect, sync_playwright

    from scripts.chromium import NAMES, OPTIONS, PROGRAM, find_chromium

    expect.set_options(timeout=PATIENCE)
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"there is no Chromium: none of {', '.join(NAMES)} is in PATH, and {PROGRAM} names none")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="package")
def tab(browser: "Browser") -> "Page":
    """One tab for all tests: there, the page is loaded again in a third of the time that it takes in a new one."""
    tab = browser.new_page()
    tab.set_default_timeout(PATIENCE)
    return tab


@pytest.fixture
def look() -> dict[str, Any]:
    """The size of the window and the system's colours; a test may parametrise it."""
    return {"viewport": {"width": 800, "height": 600}, "colors": "light"}


@pytest.fixture
def opened(tab: "Page", address: str, session: "Session", look: dict[str, Any]) -> "Iterator[Page]":
    """The page in a browser. Fails if the page asked another host for anything, or a script of it failed."""
    hosts, complaints = set(), []

    def asked(request: "Request") -> None:
        hosts.add(urlsplit(request.url).netloc)

    def failed(error: "Error") -> None:
        complaints.append(str(error))

    def said(message: "ConsoleMessage") -> None:
        # What the page's policy forbids is not requested, but reported.
        if "Content Security Policy" in message.text:
            complaints.append(message.text)

    listeners = {"request": asked, "pageerror": failed, "console": said}
    for event, listener in listeners.items():
        tab.on(event, listener)
    tab.set_viewport_size(look["viewport"])
    tab.emulate_media(color_scheme=look["colors"])
    session.made.clear()  # a long gallery takes time to show
    tab.goto(address)
    tab.locator("#make").wait_for()
    yield tab
    tab.goto("about:blank")  # ends what the test left running
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert hosts - {""} == {urlsplit(address).netloc}
    assert complaints == []


@pytest.fixture
def apple(session: "Session", tmp_path: Path) -> Path:
    """A picture that the session does not know: not ours, and in a format that Pillow writes."""
    file = tmp_path / "apple.png"
    request = {"prompt": "a red apple on a green background", "seed": 5, "steps_prior": 2, "steps_decoder": 1}
    (made,) = session.service.predict(request, lambda *_: None)
    file.write_bytes(made.read_bytes())
    return file
