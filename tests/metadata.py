"""What picture files say, read with Pillow, and by the rules of those who read A1111's text."""

import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
EXIF = 0x8769


class Texts(NamedTuple):
    """Of a picture file; "" for what is not there."""

    description: str
    parameters: str
    source: str


def read_texts(file: Path | bytes) -> Texts:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        (source,) = ElementTree.fromstring(image.info["xmp"]).iter(f"{IPTC}DigitalSourceType")
        if image.format == "PNG":
            return Texts(image.text.get("Description", ""), image.text.get("parameters", ""), source.text)
        exif = image.getexif()
        comment = exif.get_ifd(EXIF).get(0x9286, b"UNICODE\0")
        assert comment[:8] == b"UNICODE\0"
        return Texts(exif.get(0x010E, ""), comment[8:].decode("utf-16-be"), source.text)


def read_record(file: Path | bytes) -> dict[str, Any]:
    return json.loads(read_texts(file).description)


class Infotext(NamedTuple):
    prompt: str
    negative: str
    settings: dict[str, str]


def read_as_a1111(text: str) -> Infotext:
    """As the web UI does it, line by line: settings in the last line, prompts in the others, which are stripped."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'(\w[\w /-]+): *("(?:[^"\\]|\\.)*"|[^,]*)(?:, *|$)', last)
    assert len(pairs) >= 3, "with fewer, the last line counts as part of the prompt"
    prompts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in map(str.strip, lines):
        negative = negative or line.startswith("Negative prompt:")
        prompts[negative].append(line.removeprefix("Negative prompt:").strip() if negative else line)
    settings = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return Infotext("\n".join(prompts[False]), "\n".join(prompts[True]), settings)


def read_as_civitai(text: str) -> Infotext:
    """As the site does it: settings in the first line that begins with "Steps: ", the rest cut at "Negative prompt:"."""
    lines = [line for line in text.split("\n") if line.strip()]
    settings = next(line for line in lines if line.startswith("Steps: "))
    lines.remove(settings)
    prompt, *negative = (part.strip() for part in "\n".join(lines).split("Negative prompt:"))
    assert len(negative) <= 1
    quoteless = re.sub(r'"(\\.|[^\\"])*"', "quoted", settings)
    return Infotext(prompt, "".join(negative), dict(pair.split(": ", 1) for pair in quoteless.split(", ")))
