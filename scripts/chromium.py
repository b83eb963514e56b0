"""Finds the Chromium that draws and tests the page of ``scripts/studio``."""

import os
import shutil

PROGRAM = "CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser in a container, run by root, has no sandbox. It opens only pages of this machine.
OPTIONS = ("--no-sandbox", "--disable-dev-shm-usage")


def find_chromium() -> str | None:
    """The program that the environment variable CHROMIUM names, else the first of `NAMES` in PATH; None: there is none."""
    return os.environ.get(PROGRAM) or next((path for name in NAMES if (path := shutil.which(name))), None)
