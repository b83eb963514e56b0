"""Draws the page of ``scripts/studio`` after some pictures, in a browser without a window."""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from scripts.chromium import OPTIONS, PROGRAM, find_chromium
from scripts.environment import ROOT
from studio.door import load, served

PROMPTS = (
    "a snowman in the center on a blue to white gradient",
    "a rocket above a full moon on a dark blue background",
    "a lemon to the left of a watermelon on a blue background",
    "an octopus in cartoon style on a turquoise background",
    "a parrot on a dark green background",
)
HEIGHT = 860


def draw(address: str, chromium: str, width: int, *, dark: bool) -> Image.Image:
    """The page after a picture of each prompt, with seed 0."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        page = browser.new_page(
            viewport={"width": width, "height": HEIGHT}, color_scheme="dark" if dark else "light", device_scale_factor=1
        )
        page.set_default_timeout(300_000)
        page.goto(address)
        for number, prompt in enumerate(PROMPTS, 1):
            make(page, prompt, number)
        page.mouse.move(0, 0)
        shot = page.screenshot(full_page=width < HEIGHT)
        browser.close()
    return Image.open(io.BytesIO(shot)).convert("RGB")


def make(page: Page, prompt: str, number: int) -> None:
    """Type a prompt, and wait until the gallery has `number` pictures."""
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#seed textarea").fill("0")
    page.locator("#make").click()
    expect(page.locator("#gallery button.thumbnail-lg")).to_have_count(number, timeout=300_000)
    expect(page.locator("#make")).to_be_visible()
    page.wait_for_function("[...document.images].every(one => one.complete)")


def main(arguments: list[str] | None = None) -> int:
    """``scripts/make-studio-picture``; ``arguments`` default to the process's. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/make-studio-picture", description="Draw the page of scripts/studio.")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "images" / "studio.webp", help="default: %(default)s"
    )
    parser.add_argument("--width", type=int, default=1280, help="of the window in pixels (default: %(default)s)")
    parser.add_argument("--dark", action="store_true", help="as on a system whose windows are dark")
    options = parser.parse_args(arguments)
    chromium = find_chromium()
    if chromium is None:
        sys.stderr.write(f"There is no Chromium in PATH; install one, or name it in {PROGRAM}.\n")
        return 1
    os.environ.update(CASCADE_WEIGHTS=str(ROOT / "weights" / "mini"), CASCADE_DEVICE="cpu")
    with tempfile.TemporaryDirectory() as folder, served(load(Path(folder), Path(folder, "pictures"))) as address:
        draw(address, chromium, options.width, dark=options.dark).save(options.output, quality=75, method=6)
    sys.stdout.write(f"{options.output}\n")
    return 0
