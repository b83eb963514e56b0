"""The code in README.md and docs, as its tests run it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def block(page: Path, language: str, word: str) -> str:
    """The only fenced code of a language that has a word in it."""
    (found,) = (code for code in blocks(page, language) if word in code)
    return found


def commands(page: Path) -> list[str]:
    """Indented code outside of fences: what a person types. A command of several lines is joined to one."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return "\n".join(lines).replace("\\\n", "").splitlines()
