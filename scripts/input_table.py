"""Updates the table of inputs in docs/inputs.md from Cog's schema. Run it as ``python -m scripts.input_table``."""

import json
import sys
from typing import Any

from scripts.environment import ROOT
from scripts.openapi import make_schema

PAGE = ROOT / "docs" / "inputs.md"
BEGIN, END = "<!-- Made by scripts/input_table.py -->\n", "<!-- End of the inputs -->"
KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}


def input_table() -> str:
    """A Markdown table with one row per input, in the order of ``Predictor.run``."""
    schemas = make_schema((ROOT / "predict.py").read_text(encoding="utf-8"))["components"]["schemas"]
    fields = sorted(schemas["Input"]["properties"].items(), key=lambda item: item[1]["x-order"])
    rows = [f"| `{name}` | {kind(name, field, schemas)} | {default(field)} | {said(field)} |" for name, field in fields]
    return "\n".join(["| Input | Kind | Default | What it does |", "|---|---|---|---|", *rows]) + "\n"


def kind(name: str, field: dict[str, Any], schemas: dict[str, Any]) -> str:
    if "allOf" in field:
        return " ".join(f"`{choice}`" for choice in schemas[name]["enum"])
    if field["type"] == "array":
        return f"list of {kind(name, field['items'], schemas)}s"
    return "file" if field.get("format") == "uri" else KINDS[field["type"]]


def default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    value = field["default"]
    if value in (None, ""):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def said(field: dict[str, Any]) -> str:
    return field["description"].replace("|", "\\|")


def with_table(text: str) -> str:
    """The text of docs/inputs.md with an up-to-date table.

    Raises:
        ValueError: the text lacks the comments that enclose the table.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"docs/inputs.md must hold the lines {BEGIN.strip()} and {END}.")
    return before + begin + input_table() + end + after


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")


if __name__ == "__main__":
    main()
