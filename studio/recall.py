"""Brings back the settings of a picture file of ours, and the images that it was made from."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.limits import LIMITS, InputError
from serving.earlier import current
from serving.record import read_record
from studio.session import Session


@dataclass(frozen=True)
class Recalled:
    """The settings that a file brings back.

    Attributes:
        inputs: by name, in which images are paths; those that the page lacks are not in it.
        exact: those without images, as the file says them.
        index: the picture's place in its request.
        lacking: the images that the session lacks, each with its input's name and place, as in "image_prompts[0]", and its
            sha256 ("": the file does not say it).
        remarks: sentences on why the picture may not become the same.
    """

    inputs: Mapping[str, Any]
    exact: Mapping[str, Any]
    index: int
    lacking: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def recall(session: Session, path: Path, known: Collection[str]) -> Recalled:
    """The settings in a picture file of ours.

    Args:
        session: has the images that it used in this session.
        path: of the file.
        known: the names of the inputs that there are now.

    Raises:
        InputError: the file has no settings, or others than are allowed.
    """
    record = read_record(path)
    if record is None:
        raise InputError(f"{path.name} has no settings of ours: it must be a PNG, JPEG or WebP that was made here.")
    try:
        return _recalled(session, record, known)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"The settings in {path.name} are damaged.") from error


def _recalled(session: Session, record: Mapping[str, Any], known: Collection[str]) -> Recalled:
    inputs = current(record["inputs"])
    exact = {name: value for name, value in inputs.items() if name in known}
    for name, value in exact.items():
        LIMITS[name].check(name, value)
    found, lacking = find_images(session, record.get("files") or ())
    remarks = []
    if gone := sorted(inputs.keys() - set(known)):
        remarks.append(f"There is no input {', '.join(gone)} now.")
    if "prompts_cut" in record or "prompt" not in record["inputs"]:
        remarks.append("The file does not hold all of its prompts.")
    origin = session.service.origin
    if record["model"] != dict(origin.model):
        remarks.append(f"It was made with other weights ({record['model']['name']}), so the picture will differ.")
    elif (record.get("device"), record.get("versions")) != (dict(origin.device), dict(origin.versions)):
        remarks.append("It was made on another device or with other versions, so its bytes may differ.")
    return Recalled({**exact, **found}, exact, int(record["picture"]["index"]), tuple(lacking), tuple(remarks))


def find_images(session: Session, files: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The paths of a record's images by input, in a list for those that are lists; and those that the session lacks."""
    found: dict[str, Any] = {}
    lacking = []
    for file in files:
        name, index, digest = file["input"], file.get("index"), file.get("sha256", "")
        path = session.find(digest)
        if path is None:
            lacking.append((name if index is None else f"{name}[{index}]", digest))
        elif index is None:
            found[name] = path
        else:
            found.setdefault(name, []).append(path)
    return found, lacking
