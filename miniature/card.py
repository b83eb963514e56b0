"""The parts of the miniature's card that a program writes: sizes, steps and scores.

In the card, such a part stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``. The rest is written by hand.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade.weights import DISTILLED, TURBO, ModelFolder
from cascade.weights.making import empty_network
from miniature.evaluate_images import HEADINGS
from miniature.fingerprint import fingerprint
from training.distilled import ADAPTERS
from training.errors import FILE_ERRORS, TrainingError, summary, writing
from training.files import whole_file
from training.recipe import costs_table

CARD, COSTS = "README.md", "training.json"
PURPOSES = {
    "prior": "Stage C: semantic latents from text",
    "decoder": "Stage B: latents from semantic latents",
    "vqgan": "Stage A: pixels from latents",
    "text_encoder": "CLIP's text tower",
    "image_encoder": "CLIP's vision tower",
    "effnet": "semantic latents from pixels",
    "previewer": "a small picture from semantic latents",
    "controlnet_canny": "guides Stage C by a picture's edges",
    "controlnet_inpainting": "guides Stage C by the picture around a mask",
    "controlnet_super_resolution": "guides Stage C by a smaller picture",
    "ip_adapter": "guides Stage C by reference images",
}

OF_LORAS = """`ink.safetensors` is a style: black drawings of the same objects in scenes, from [Fluent UI
Emoji](https://github.com/microsoft/fluentui-emoji) in high contrast, as @iconify-json/fluent-emoji-high-contrast 1.2.6 (MIT,
Microsoft). `pim.safetensors` is a subject with a word of its own, `[pim]`, in scenes of
[one drawing](../../miniature/subject.svg) that was made for this repository (Apache-2.0)."""


@dataclass(frozen=True)
class Scores:
    """Files of scores; None: there are none.

    Attributes:
        text: the output folder of ``scripts/evaluate-mini``.
        ip_adapter: that of ``miniature.evaluate_ip_adapter``.
        turbo: a ``compare-SEED.json`` of ``scripts/evaluate-mini --compare``, with the ``.md`` beside it.
        loras: a ``loras-SEED.md`` of ``scripts/evaluate-mini --loras``.
    """

    text: Path | None = None
    ip_adapter: Path | None = None
    turbo: Path | None = None
    loras: Path | None = None


def outdated(new: Collection[str]) -> set[str]:
    """The parts of a card whose scores do not hold with these new components."""
    if set(new) - {"previewer", "ip_adapter", *ADAPTERS, "loras"}:
        return {"scores", "images", "ip-adapter", "turbo", "loras"}
    found = {"ip-adapter"} if "ip_adapter" in new else set()
    found |= {"turbo"} if set(ADAPTERS) & set(new) else set()
    return found | ({"loras"} if "loras" in new else set())


def write_card(folder: Path, scores: Scores, new: Collection[str]) -> None:
    """Writes the parts of the card ``README.md`` in a model folder. Parts without new scores stay while they hold.

    Args:
        folder: the model folder, with ``training.json``.
        new: components that are new in it, and "loras".

    Raises:
        TrainingError: a file is missing, damaged or of other weights, or the card lacks a part's markers.
    """
    parts = {"sizes": sizes(folder)}
    if (folder / COSTS).is_file():
        parts["training"] = training(folder)
    gone = outdated(new)
    if scores.text is not None:
        parts |= judged(folder, scores.text)
    elif "scores" in gone:
        parts |= {"scores": "Not judged yet.", "images": ""}
    for name, heading, there, file, find in (
        ("ip-adapter", "the IP-Adapter", folder / "ip_adapter", scores.ip_adapter, adapter_table),
        ("turbo", "the speed turbo", folder / DISTILLED, scores.turbo, turbo_table),
        ("loras", "LoRAs", folder / "loras", scores.loras, lambda _, file: _read(file)),
    ):
        if not there.exists():
            parts[name] = ""
            continue
        if file is not None or name in gone:
            told = f"{OF_LORAS}\n\n" if name == "loras" else ""
            parts[name] = f"### With {heading}\n\n{told}{'Not judged yet.' if file is None else find(folder, file)}"
    card = folder / CARD
    text = filled(_read(card), parts)
    with writing(card), whole_file(card) as part:
        part.write_text(text + "\n", encoding="utf-8")


def filled(card: str, parts: Mapping[str, str]) -> str:
    """A card with new parts.

    Raises:
        TrainingError: it lacks the markers of one.
    """
    for name, text in parts.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        if card.count(begin) != 1 or card.count(end) != 1 or card.index(begin) > card.index(end):
            raise TrainingError(f"The card must have {begin} once, and {end} once after it.")
        before, rest = card.split(begin)
        inside = f"\n{text.strip()}\n" if text.strip() else "\n"
        card = f"{before}{begin}{inside}{end}{rest.split(end)[1]}"
    return card


def sizes(folder: Path) -> str:
    """Parameters and megabytes in all, and a table of the networks."""
    opened = ModelFolder.open(folder)
    counts = {
        name: sum(one.numel() for one in empty_network(name, folder / name / "config.json").parameters())
        for name in PURPOSES
        if name in opened
    }
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != CARD)
    return "\n".join(
        [
            f"{sum(counts.values()) / 1e6:.1f} million parameters, {size / 1e6:.1f} MB:",
            "",
            "| component | parameters | |",
            "|---|---:|---|",
            *(f"| {name} | {count:,} | {PURPOSES[name]} |" for name, count in counts.items()),
        ]
    )


def training(folder: Path) -> str:
    """Steps and times of all stages, as the program measured them."""
    try:
        table = costs_table(json.loads(_read(folder / COSTS)))
    except FILE_ERRORS as error:
        raise TrainingError(f"{folder / COSTS} is damaged: {summary(error)}.") from error
    return (
        "[training.json](training.json) has what the program measured. Minutes are those of all processes of a stage together, "
        "one on each GPU, with loading, encoding and compiling.\n\n" + table
    )


def adapter_table(folder: Path, scores: Path) -> str:
    """The tables of ``miniature.evaluate_ip_adapter``."""
    _check(scores / "scores.json", folder, "ip_adapter")
    return _read(scores / "table.md")


def turbo_table(folder: Path, scores: Path) -> str:
    """The table of ``scripts/evaluate-mini --compare``."""
    _check(scores, folder, TURBO)
    return _read(scores.with_suffix(".md"))


def judged(folder: Path, scores: Path) -> dict[str, str]:
    """The parts "scores" and "images" from the tables of ``scripts/evaluate-mini``."""
    _check(scores / "scores.json", folder)
    text = _read(scores / "table.md")
    first = re.search(rf"^{re.escape(HEADINGS['variation'])}", text, re.MULTILINE)
    place = first.start() if first else len(text)
    return {"scores": text[:place], "images": f"### With images\n\n{text[place:]}" if first else ""}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except FILE_ERRORS as error:
        raise TrainingError(f"{file} cannot be read: {summary(error)}.") from error


def _check(file: Path, folder: Path, *used: str) -> None:
    """Checks that scores are those of a folder's weights.

    Raises:
        TrainingError: they are of others, or the file is damaged.
    """
    try:
        content = json.loads(_read(file))
        weights = content.get("of", content).get("weights")
    except (*FILE_ERRORS, AttributeError) as error:
        raise TrainingError(f"{file} is damaged: {summary(error)}.") from error
    if weights != fingerprint(folder, *used):
        raise TrainingError(f"{file} has the scores of other weights than those in {folder}.")
