"""The miniature's page, served in this process, and a browser for it.

Imports of Gradio, Playwright and torch stand in functions: whoever runs other tests reads this file, too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.conftest import MINI

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from studio.session import Session

# Milliseconds: a busy machine is no fault of the page.
PATIENCE = 60_000


@pytest.fixture(scope="package")
def session(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Session]":
    from studio import door

    if not (MINI / "model.json").is_file():
        pytest.skip("weights/mini is not there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(MINI))
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


@pytest.fixture
def look() -> dict[str, object]:
    """How the browser is set up; a test may parametrise it."""
    return {}


@pytest.fixture
def opened(browser: "Browser", address: str, look: dict[str, object]) -> "Iterator[Page]":
    """The page in a browser. Fails if the page asked another host for anything, or a script of it failed."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **look})
    context.set_default_timeout(PATIENCE)
    tab = context.new_page()
    hosts, complaints = set(), []
    tab.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    # What the page's policy forbids is not requested, but reported.
    tab.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    tab.goto(address)
    tab.locator("#make").wait_for()
    yield tab
    context.close()
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
