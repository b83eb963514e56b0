"""An `Adapter`: the content of a file with a LoRA or a similar adapter, before it is known which model it is for."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.weights.errors import WeightsError, shortened
from cascade.weights.lora import authors, files, formats, parts, peft
from cascade.weights.lora.changes import finite
from cascade.weights.lora.files import Package, Stored

# Keys of words that were learned with an adapter (OneTrainer): "bundle_emb.", the word, and one of these.
BUNDLED = "bundle_emb."
VECTORS, OUTPUTS = "clip_g", "clip_g_out"
# Values that are checked at a time: so many that all cores of the CPU take part, and a copy in float32 is small.
PIECE = 1 << 22
# torch lacks operators for other dtypes, such as unsigned ones of 16 bits and more, float4 and bare exponents.
KINDS_OF_NUMBERS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
)


class Place(NamedTuple):
    """The layer of a group of tensors: the networks that its prefix may mean, and its name as the file spells it."""

    networks: tuple[str, ...]
    layer: str


@dataclass(frozen=True, eq=False)
class Group:
    """The tensors of one layer.

    Attributes:
        place: their layer.
        tensors, keys: by the names of `parts.SUFFIXES`: the tensors, and their keys in the file.
        scale: the scale for `algorithms`, if the tensors do not have it; None: they have it.
    """

    place: Place
    tensors: dict[str, Tensor]
    keys: dict[str, str]
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as it is stored.

    Attributes:
        path: of its file, folder or archive.
        format: the program that wrote it, as text for people.
        groups: the tensors by layer, except in the authors' format.
        numbered: in the authors' format: by number, "down" and "up".
        settings: what the authors' format does not say; None: not given.
        words: by name, the vectors of words that have a name, "clip_g", and the vectors that are added to the text
            encoder's outputs, "clip_g_out", (n, D).
        rows: vectors and indices of words that have a number, in the authors' format.
        unread: keys that do not belong to an adapter.
        shapes: of all tensors, by key.
        metadata: of its first file.
    """

    path: Path
    format: str
    groups: tuple[Group, ...]
    numbered: Mapping[int, Mapping[str, Tensor]]
    settings: authors.Settings | None
    words: Mapping[str, Mapping[str, Tensor]]
    rows: tuple[Tensor, Tensor] | None
    unread: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: str | PathLike[str], settings: Sequence[str | PathLike[str]] = ()) -> "Adapter":
        """Read a file, a folder in PEFT's form, a tar or a zip.

        Args:
            path: of what was read, see `files`.
            settings: JSON files with the settings that the authors' format lacks. The first one that exists is used, unless
                there is a JSON file beside the adapter or in its archive.

        Raises:
            WeightsError: the file does not exist, is damaged, is a pickle, is too large or is not an adapter.
        """
        package = files.read(Path(path))
        found = _settings(package, [Path(one) for one in settings])
        several = len(package.files) > 1
        read = [_read(package, file, several) for file in package.files]
        return dataclasses.replace(
            read[0],
            settings=found,
            groups=tuple(group for one in read for group in one.groups),
            words={name: word for one in read for name, word in one.words.items()},
            unread=tuple(key for one in read for key in one.unread),
            shapes={key: shape for one in read for key, shape in one.shapes.items()},
        )

    @property
    def title(self) -> str:
        """The file and its format, for the beginning of a sentence."""
        return f"{self.path} ({self.format})"


def _settings(package: Package, others: Sequence[Path]) -> authors.Settings | None:
    """Settings that accompany an adapter in the authors' format."""
    if not any(
        authors.NUMBERED.fullmatch(key) or key == authors.VECTORS for file in package.files for key in file.tensors
    ):
        return None
    for file in package.files:
        if authors.METADATA in file.metadata:
            where = f"{package.path}: {authors.METADATA}"
            return authors.settings_of(files.json_object(where, file.metadata[authors.METADATA].encode()), where)
    for name, content in package.documents.items():
        where = f"{package.path}: {name}"
        found = authors.settings_of(files.json_object(where, content), where)
        if found is not None:
            return found
    for path in others:
        if path.is_file():
            return authors.settings_of(files.json_object(path, path.read_bytes()), str(path))
    return None


def _read(package: Package, file: Stored, several: bool) -> Adapter:
    where = f"{package.path}: {file.name}" if several else str(package.path)
    if not file.tensors:
        raise WeightsError(f"{where} holds no tensors.")
    _check_numbers(where, file)
    keys = authors.numbered(list(file.tensors))
    words, rows, inversion = _words(package, file)
    used = {key for pair in keys.values() for key in pair.values()} | words.keys() | rows.keys()
    taken = {key: part for key in file.tensors if key not in used and (part := parts.split(key)) is not None}
    if keys or (rows and not taken):
        title = formats.AUTHORS
    elif inversion:
        title = formats.TEXTUAL_INVERSION
    else:
        title = formats.title(taken.values(), file.metadata)
    groups = _groups(package, file, taken, where)
    named: dict[str, dict[str, Tensor]] = {}
    for key, (name, kind) in words.items():
        named.setdefault(name, {})[kind] = file.tensors[key]
    prefix = f"{file.name.parent}/" if several and file.name.parent.name else ""
    return Adapter(
        path=package.path,
        format=title,
        groups=groups,
        numbered={i: {name: file.tensors[key] for name, key in pair.items()} for i, pair in keys.items()},
        settings=None,
        words=named,
        rows=(file.tensors[authors.VECTORS], file.tensors[authors.INDICES]) if rows else None,
        unread=tuple(prefix + key for key in file.tensors if key not in used and key not in taken),
        shapes={prefix + key: tuple(tensor.shape) for key, tensor in file.tensors.items()},
        metadata=file.metadata,
    )


def _check_numbers(where: str, file: Stored) -> None:
    for key, tensor in file.tensors.items():
        if tensor.dtype not in KINDS_OF_NUMBERS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(f"{where}: {shortened(key, 80)} is stored as {kind}, which no adapter is.")
    if all(finite(piece) for run in file.runs for piece in run.split(PIECE)):
        return
    for key, tensor in file.tensors.items():
        if not finite(tensor):
            raise WeightsError(f"{where}: {shortened(key, 80)} holds values that are infinite or no numbers (NaN).")


def _words(package: Package, file: Stored) -> tuple[dict[str, tuple[str, str]], dict[str, Tensor], bool]:
    """The keys of named words, each with the word's name and kind; the tensors of numbered words; and whether the file is a
    textual inversion.
    """
    found = {}
    for key in file.tensors:
        name, _, kind = key.removeprefix(BUNDLED).rpartition(".")
        if key.startswith(BUNDLED) and name and kind in (VECTORS, OUTPUTS):
            found[key] = (name, kind)
    if VECTORS in file.tensors and set(file.tensors) <= {VECTORS, OUTPUTS}:
        return {key: (package.stem, key) for key in file.tensors}, {}, True
    (first, *others) = file.tensors
    if not others and file.tensors[first].ndim in (1, 2) and first[:1] + first[-1:] in ("<>", "[]"):
        return {first: (first, VECTORS)}, {}, True  # diffusers' form
    rows = {key: file.tensors[key] for key in (authors.VECTORS, authors.INDICES) if key in file.tensors}
    return found, rows if len(rows) == 2 else {}, False


def _groups(package: Package, file: Stored, taken: Mapping[str, parts.Part], where: str) -> tuple[Group, ...]:
    """Tensors by layer."""
    config = package.config(file)
    by_prefix = peft.from_metadata(file.metadata, where)
    by_place: dict[tuple[str, str], dict[str, str]] = {}
    for key, part in taken.items():
        names = by_place.setdefault((part.prefix, part.layer), {})
        names[part.name if part.name not in names else f"{part.name} again"] = key
    scales: dict[tuple[str, str], float] = {}
    for prefix in {prefix for prefix, _ in by_place}:
        settings = config if prefix == "base_model.model." else by_prefix.get(prefix)
        layers = [layer for one, layer in by_place if one == prefix]
        if settings is not None:
            scales |= {(prefix, layer): scale for layer, scale in peft.scales(settings, layers, where).items()}
        elif prefix == "base_model.model." and not any("alpha" in names for names in by_place.values()):
            raise WeightsError(f"{where} (PEFT's format) needs {files.PEFT_CONFIG} beside it, which says alpha.")
    networks = _networks(file, config)
    groups = []
    for (prefix, layer), names in by_place.items():
        tensors = {name: file.tensors[key] for name, key in names.items()}
        place = Place(networks if networks and prefix == "base_model.model." else parts.PREFIXES[prefix], layer)
        groups.append(Group(place, *_in_order(tensors, names), scales.get((prefix, layer))))
    return tuple(groups)


def _networks(file: Stored, config: Mapping[str, object] | None) -> tuple[str, ...]:
    """The networks that a folder of PEFT's, or its configuration, is for; () if neither says."""
    folder = file.name.parent.name
    if folder in ("text_encoder", "prior", "decoder"):
        return (folder,)
    of_text = None if config is None else peft.is_of_text(config)
    return () if of_text is None else parts.TEXT if of_text else parts.UNETS


def _in_order(tensors: dict[str, Tensor], keys: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A layer's tensors under the names that `algorithms` use."""
    if "magnitude_out" in tensors and "magnitude" not in tensors:  # one per output, in any shape
        tensors["magnitude"] = tensors.pop("magnitude_out").flatten()
        keys["magnitude"] = keys.pop("magnitude_out")
    if "weight" in tensors and "on_input" not in tensors and "set" not in tensors:
        tensors["set"], keys["set"] = tensors.pop("weight"), keys.pop("weight")
    return tensors, keys
